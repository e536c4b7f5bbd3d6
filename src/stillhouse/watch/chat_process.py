"""The chat's process: `python -m stillhouse.watch.chat_process THREADS DEVICE`.

Reads requests as JSON lines from standard input, and writes their events as JSON lines to standard
output. Exits when standard input closes, so that it never outlives the server.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def be_modest(threads: int) -> None:
    """Yield to everything else: lowest priority, few threads, and the first process to be killed if
    memory runs out."""
    os.nice(19)
    with suppress(OSError):  # on Linux only
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    import torch

    torch.set_num_threads(threads)


def read_requests(
    source: IO[str], requests: queue.SimpleQueue[dict[str, Any]], stopped: set[int]
) -> None:
    for line in source:
        message = json.loads(line)
        if "stop" in message:
            stopped.add(message["stop"])
        else:
            requests.put(message)
    os._exit(0)


def main(threads: int, device: str) -> None:
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep what libraries print apart from events
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    stopped: set[int] = set()
    arguments = (sys.stdin, requests, stopped)
    threading.Thread(target=read_requests, args=arguments, daemon=True).start()

    def say(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    request = requests.get()
    say({"state": "starting"})
    be_modest(threads)
    from stillhouse.watch.chat_models import ChatModels

    models = ChatModels(device)
    while True:
        number = request["id"]
        models.answer(request, say, lambda number=number: number in stopped)  # type: ignore[misc]
        say({"end": number})
        request = requests.get()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
