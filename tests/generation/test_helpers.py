"""Only processes of the same torchrun answer requests of the main process."""

from __future__ import annotations

import socket
import threading
from multiprocessing.connection import Client, Connection, Listener

import pytest

from stillhouse.generation.helpers import _known

KEY = b"a key"


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\4none"], ids=["nothing", "HTTP", "a message"]
)
def test_connections_without_the_key_are_ignored(said: bytes) -> None:
    with Listener(("127.0.0.1", 0)) as listener:
        found: list[Connection] = []
        accepting = threading.Thread(target=lambda: found.append(next(_known(listener, KEY))))
        accepting.start()
        with socket.create_connection(listener.address) as stray:
            stray.sendall(said)
        with Client(listener.address, authkey=KEY) as helper:
            accepting.join()
            helper.send("here")
            assert found[0].recv() == "here"
            found[0].close()


def test_a_closed_listener_is_an_error() -> None:
    with Listener(("127.0.0.1", 0)) as listener:
        pass
    with pytest.raises(OSError, match="closed"):
        next(_known(listener, KEY))
