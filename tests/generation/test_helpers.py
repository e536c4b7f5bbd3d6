"""Only processes of the same torchrun answer requests of the main process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection

import pytest

from stillhouse.generation.helpers import _connection, _connections
from stillhouse.process_watch import listening_socket

KEY = b"a key"
STRAYS = [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\6ignore", b"\0\0"]
NAMES = ["nothing", "HTTP", "a message", "a part"]


@contextmanager
def accepting(found: list[Connection]) -> Iterator[tuple[str, int]]:
    """Wait for one helper in another thread, and yield the address."""
    with listening_socket() as server:
        thread = threading.Thread(target=lambda: found.extend(_connections(server, KEY, 1)))
        thread.start()
        yield "127.0.0.1", server.getsockname()[1]
        thread.join()


def exchange(helper: Connection, found: list[Connection]) -> None:
    """Send a message over the only accepted connection."""
    helper.send("here")
    (connection,) = found
    with helper, connection:
        assert connection.recv() == "here"


@pytest.mark.parametrize("said", STRAYS, ids=NAMES)
def test_closed_connections_of_other_programs_are_ignored(said: bytes) -> None:
    found: list[Connection] = []
    with accepting(found) as address:
        with socket.create_connection(address) as stray:
            stray.sendall(said)
        helper = _connection(address, KEY)
    exchange(helper, found)


@pytest.mark.run
@pytest.mark.parametrize("said", STRAYS, ids=NAMES)
def test_open_connections_of_other_programs_block_no_helper(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillhouse.generation.helpers.HANDSHAKE_SECONDS", 1)
    found: list[Connection] = []
    with accepting(found) as address, socket.create_connection(address) as stray:
        stray.sendall(said)
        helper = _connection(address, KEY)
    exchange(helper, found)


def test_a_process_with_a_different_key_is_not_connected() -> None:
    found: list[Connection] = []
    with accepting(found) as address:
        with pytest.raises((EOFError, OSError, AuthenticationError)):
            _connection(address, b"another key")
        helper = _connection(address, KEY)
    exchange(helper, found)


def test_a_closed_listening_socket_is_an_error() -> None:
    with listening_socket() as server:
        pass
    with pytest.raises(ValueError, match="file descriptor"):
        _connections(server, KEY, 1)
