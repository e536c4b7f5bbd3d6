"""Notices when another process of a torchrun ends, whatever this process is doing.

torchrun stops the processes on its own machine, and collectives fail at once if a process is gone.
But a process on a different machine that works alone or waits for a file would never find out. So
the main process keeps a connection to every other process. The system closes a connection when
either process ends, even if it is killed; TCP keepalive detects a lost machine.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from stillhouse.errors import LostProcessError
from stillhouse.launch import (
    is_on_this_machine,
    leads,
    local_index,
    may_report,
    on_main_machine,
    process_index,
    speaks_for_machine,
    world_size,
)

DONE, FAILED, KILLED, STOPPED, LOST = b"d", b"f", b"k", b"s", b"l"
"""How a process ends: it finished, reports an error itself, closed its connections without a
message, received a signal, or has lost another process and does not know which."""
GRACE_SECONDS = 3.0
"""How long a process may take to end by itself after another has, before it gets a signal."""
NOTICE_SECONDS = 1.0
"""How much later the news of an ended process may arrive than a collective's error, or than the
news of a process that ended because of it."""
CONNECT_SECONDS = 10.0
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A machine that does not answer for 30 seconds is considered lost."""
INDEX_BYTES = 4
AGAIN = "run the same command again: it resumes from the last checkpoint"
REASONS = {
    FAILED: "its own message says why",
    KILLED: "it was killed, or its machine cannot be reached",
    STOPPED: "it was stopped by a signal",
    LOST: "because another process has ended",
}
"""Ordered from what ends a torchrun to what may follow from it: torchrun stops the remaining
processes."""

_ended: dict[int, bytes] = {}
"""Processes that ended before their work was finished, and how they ended."""
_cause_known = threading.Event()
"""Set once one of the ended processes is known to have failed or been killed."""
_finished: set[int] = set()
"""Processes that this process watches and that have finished their work."""


@contextmanager
def watched_processes() -> Iterator[None]:
    """Send this process SIGTERM a few seconds after another process of the torchrun has ended
    without finishing its block, unless this process ends by itself first.

    A failing process tells the others before it prints its own error. All processes must enter the
    block together, with an open process group.
    """
    if world_size() == 1:
        yield
        return
    _ended.clear()
    _cause_known.clear()
    _finished.clear()
    links = _connect()
    if not links:  # the main process cannot be waited for
        _finished.add(0)
    threading.Thread(target=_watch, args=(links,), daemon=True).start()
    own = process_index()
    index, how = own, DONE  # its last message names the process that made it end
    try:
        yield
    except LostProcessError:
        index, how = _cause() or (own, LOST)
        raise
    except Exception:
        index, how = own, FAILED
        raise
    except BaseException:  # a signal, from the user or because another process has ended
        index, how = _cause() or (own, STOPPED)
        raise
    finally:
        # The connections stay open until this process has reported its error and ended.
        for link in links:
            with suppress(OSError):
                link.sendall(how + index.to_bytes(INDEX_BYTES))


def lost_process_found(wait: float = 0.0) -> LostProcessError | None:
    """Return the error about a process that ended too early; None if none did. Of several, prefer
    the process that made the others end, as far as is known.

    wait: seconds to wait, at most, for news of a process that failed or was killed.
    """
    _cause_known.wait(wait)
    cause = _cause()
    if cause is None:
        return None
    index, how = cause
    return LostProcessError(
        f"process {index} of {world_size()} has ended", where=REASONS[how], fix=AGAIN
    )


def main_process_finished() -> bool | None:
    """True if the main process has finished its block, None if not yet; for the other processes."""
    return 0 in _finished or None


def reports_lost_process() -> bool:
    """Whether this process is the one on its machine that reports another process's end. No process
    does if the ended process was on this machine and reports its own error.

    True only once: a signal may arrive while a collective's error is being reported.
    """
    _cause_known.wait(NOTICE_SECONDS)
    if any(how == FAILED and is_on_this_machine(index) for index, how in _ended.items()):
        return False
    main_is_lost = on_main_machine() and _ended.get(0) in (KILLED, STOPPED)
    return (speaks_for_machine() if main_is_lost else local_index() == 0) and may_report()


def was_lost() -> bool:
    """Whether another process ended too early, and not because of the signal that this process
    got."""
    if world_size() > 1:
        _cause_known.wait(NOTICE_SECONDS)
    return any(how != STOPPED or not on_main_machine() for how in _ended.values())


def _cause() -> tuple[int, bytes] | None:
    """The process that made the others end, as far as is known, and how it ended."""
    order = list(REASONS)
    return min(_ended.items(), key=lambda each: order.index(each[1]), default=None)


# --- connections -------------------------------------------------------------------------------


def _connect() -> Mapping[socket.socket, int]:
    """Connect the main process with all others, and return this process's connections with the
    other ends' ranks. Connections that fail are left out."""
    import torch.distributed as dist  # heavy, and the command line imports this module

    links: dict[socket.socket, int] = {}
    if leads():
        with listening_socket() as server:
            key = secrets.token_bytes(16)
            dist.broadcast_object_list([server.getsockname()[1], key])
            dist.barrier()  # by now, every other process has connected or given up
            server.settimeout(0)
            accepted = []
            with suppress(OSError):
                while True:
                    accepted.append(server.accept()[0])
            # All share one deadline, so that silent connections of other programs cost a second.
            deadline = time.monotonic() + NOTICE_SECONDS
            for link in accepted:
                index = _greeted(link, key, deadline)
                if index is not None:
                    links[link] = index
    else:
        received: list[object] = [None, None]
        dist.broadcast_object_list(received)
        port, key_ = received
        assert isinstance(port, int)
        assert isinstance(key_, bytes)
        with suppress(OSError):
            address = (os.environ["MASTER_ADDR"], port)
            link = socket.create_connection(address, timeout=CONNECT_SECONDS)
            link.sendall(key_ + process_index().to_bytes(INDEX_BYTES))
            links[link] = 0
        dist.barrier()
    for link in links:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Linux
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return links


def listening_socket() -> socket.socket:
    """Open a port for the other processes of the torchrun, on all of this machine's addresses."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=world_size(), dualstack_ipv6=dual)


def _greeted(link: socket.socket, key: bytes, deadline: float) -> int | None:
    """The rank of the process at the other end; None if it is not part of this torchrun, or is
    silent until the deadline (`time.monotonic`)."""
    link.settimeout(max(0.0, deadline - time.monotonic()))
    with suppress(OSError):
        said = link.recv(len(key) + INDEX_BYTES, socket.MSG_WAITALL)
        if secrets.compare_digest(said[: len(key)], key):
            return int.from_bytes(said[len(key) :])
    link.close()
    return None


def _watch(links: Mapping[socket.socket, int]) -> None:
    said = set()
    with selectors.DefaultSelector() as selector:
        for each in links:
            selector.register(each, selectors.EVENT_READ, data=each)
        while selector.get_map():
            for key, _ in selector.select():
                link: socket.socket = key.data
                message = _received(link)
                if message is None:
                    selector.unregister(link)
                    if link in said:
                        continue
                said.add(link)
                index, how = message or (links[link], KILLED)
                if how == DONE:
                    _finished.add(index)
                    continue
                _ended[index] = how
                if how in (FAILED, KILLED):
                    _cause_known.set()
                threading.Thread(target=_end, daemon=True).start()


def _received(link: socket.socket) -> tuple[int, bytes] | None:
    """Receive the next message; None once the connection is closed."""
    try:
        message = link.recv(1 + INDEX_BYTES, socket.MSG_WAITALL)
    except OSError:  # reset, or not alive
        return None
    return (int.from_bytes(message[1:]), message[:1]) if len(message) > INDEX_BYTES else None


def _end() -> None:
    """Stop this process if it does not end by itself."""
    time.sleep(GRACE_SECONDS)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and reports_lost_process():
        sys.stderr.write(f"error: {lost_process_found()}\n")
    os.kill(os.getpid(), signal.SIGTERM)
