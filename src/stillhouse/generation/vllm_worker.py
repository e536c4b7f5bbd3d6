"""A vLLM engine with plain JSON requests and replies: in this process or in a separate one.

`python -P vllm_worker.py` reads requests from standard input and writes replies to standard output,
one JSON object per line. It imports nothing from Stillhouse, so that vLLM can be in a
separate environment, with another transformers. `python -P vllm_worker.py probe` prints what that
environment has.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import queue
import signal
import sys
import threading
from typing import Any, TextIO


def probe() -> dict[str, Any]:
    """Which packages this Python has, and how many GPUs its torch sees; imports only torch."""
    packages = {name: importlib.util.find_spec(name) is not None for name in ("vllm", "ray")}
    try:
        import torch
    except ImportError:
        return {**packages, "gpus": 0}
    return {**packages, "gpus": torch.cuda.device_count()}


def open_llm(options: dict[str, Any]) -> tuple[Any, int]:
    """A vllm.LLM, and the number of tokens that it can read and write."""
    from vllm import LLM

    llm = LLM(**options)
    return llm, int(llm.llm_engine.model_config.max_model_len)


def generate(llm: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """rows: "prompt" with token ids, and "sampling" with arguments of vllm.SamplingParams."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": row["prompt"]} for row in rows],
        sampling_params=[SamplingParams(**row["sampling"]) for row in rows],
        use_tqdm=False,
    )
    return [_answer(output.outputs[0]) for output in outputs]


def _answer(output: Any) -> dict[str, Any]:
    logprobs = None
    if output.logprobs is not None:
        positions = zip(output.token_ids, output.logprobs, strict=True)
        logprobs = [float(at[token].logprob) for token, at in positions]
    return {
        "text": output.text,
        "ids": list(output.token_ids),
        "stop": output.finish_reason,
        "logprobs": logprobs,
    }


def reason(error: BaseException) -> str:
    """The error in one line."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[-1]}"


def serve() -> None:
    """Answers {"open": options} and {"generate": rows} until {"stop": true} arrives.

    Must lead its own process group: the entire group, including vLLM's other processes, is
    killed as soon as standard input is closed, i.e. when the parent process has died.
    """
    # What vLLM and its other processes print or read must not touch the two pipes.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(lines, requests), daemon=True).start()
    llm: Any = None
    while "stop" not in (request := requests.get()):
        try:
            if "open" in request:
                llm, window = open_llm(request["open"])
                reply: dict[str, Any] = {"window": window}
            else:
                reply = {"answers": generate(llm, request["generate"])}
        # vLLM raises errors of many types, including GPU errors.
        except Exception as error:
            reply = {"error": reason(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    del llm
    gc.collect()


def _receive(lines: TextIO, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in lines:
        requests.put(json.loads(line))
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1:] == ["probe"]:
        sys.stdout.write(json.dumps(probe()) + "\n")
    else:
        serve()
