"""The main process recognizes the connections of its torchrun's other processes."""

from __future__ import annotations

import socket
import time

from stillhouse.process_watch import INDEX_BYTES, _greeted

KEY = b"k" * 16


def test_a_silent_connection_does_not_delay_a_process() -> None:
    silent, other = socket.socketpair()
    link, process = socket.socketpair()
    process.sendall(KEY + (3).to_bytes(INDEX_BYTES))
    deadline = time.monotonic()  # other connections have used up the time
    with other, process, link:
        assert _greeted(silent, KEY, deadline) is None
        assert silent.fileno() == -1, "it was not closed"
        assert _greeted(link, KEY, deadline) == 3


def test_a_wrong_key_is_not_a_process() -> None:
    link, stray = socket.socketpair()
    stray.sendall(b"x" * (len(KEY) + INDEX_BYTES))
    with stray:
        assert _greeted(link, KEY, time.monotonic()) is None
        assert link.fileno() == -1, "it was not closed"
