"""Lets the other processes of a torchrun answer requests for the main process, which owns the
journal.

Each process loads its own copy of the model. It requests work when it has room, and sends each
answer back immediately, so a kill loses only the answers being generated, as with one process. They
communicate by multiprocessing.connection, with a key that only these processes know.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from typing import Any

from stillhouse.errors import LostProcessError
from stillhouse.generation.request import Outcome, Request
from stillhouse.process_watch import NOTICE_SECONDS, listening_socket, lost_process_found
from stillhouse.shared_work import Processes

Next = Callable[[], Request | None]
Arrived = Callable[[Request, Outcome], object]
Answers = Callable[[Any, Iterator[Request]], Iterator[tuple[Request, Outcome]]]
"""(description of a model, requests) → each request with its outcome."""

HELLO = b"helper"
"""A helper's first message. Only a connection that has sent something is read from, because
reading from a silent one would block."""
HANDSHAKE_SECONDS = 30
"""How long a connection may be silent once its handshake has begun."""


@dataclass(frozen=True)
class Helpers:
    """The main process's connections to the others."""

    connections: list[Connection]

    @contextmanager
    def answering(self, model: Any, next_request: Next, arrived: Arrived) -> Iterator[None]:
        """Inside the block, let the other processes answer requests with the described model.

        When the block ends, all their answers have arrived. next_request: returns None when there
        are no more requests. Both functions are called in other threads. Raises LostProcessError.
        """
        lost: list[BaseException] = []

        def serve(connection: Connection) -> None:
            try:
                connection.send(model)
                while (message := connection.recv()) != "finished":
                    if message == "next":
                        connection.send(next_request())
                    else:
                        arrived(*message)
            except BaseException as error:  # raised again in the main thread
                lost.append(error)

        threads = [
            threading.Thread(target=serve, args=(connection,), daemon=True)
            for connection in self.connections
        ]
        for thread in threads:
            thread.start()
        try:
            yield
            for thread in threads:
                thread.join()
        except BaseException:
            self.close()
            raise
        for error in lost:
            if not isinstance(error, EOFError | OSError):
                raise error
            raise lost_process_found(NOTICE_SECONDS) or LostProcessError(
                "another process that was answering requests has ended",
                fix="see its own error message, then repeat the command: answers that arrived are "
                "in the journal",
            ) from error

    def close(self) -> None:
        for connection in self.connections:
            with suppress(OSError):
                connection.send(None)
            connection.close()


@contextmanager
def helpers_of(processes: Processes) -> Iterator[Helpers]:
    """In the main process, connect to the others, which call `help_main_process`."""
    if processes.count == 1:
        yield Helpers([])
        return
    key = secrets.token_bytes(32)
    with listening_socket() as server:
        processes.from_main((server.getsockname()[1], key))
        helpers = Helpers(_connections(server, key, processes.count - 1))
    try:
        yield helpers
    finally:
        helpers.close()


def _connections(server: socket.socket, key: bytes, count: int) -> list[Connection]:
    """Accept connections until `count` are from processes that know the key.

    Connections of other programs, such as port scanners, are closed. A silent one blocks no other;
    one that sends part of a message blocks the others for HANDSHAKE_SECONDS.
    """
    known: list[Connection] = []
    silent: list[socket.socket] = []
    try:
        while len(known) < count:
            ready = wait([server, *silent])
            for link in [link for link in silent if link in ready]:
                silent.remove(link)
                known.extend(_known(link, key))
            if server in ready:
                silent.append(server.accept()[0])
    finally:
        for link in silent:
            link.close()
    return known


def _known(link: socket.socket, key: bytes) -> list[Connection]:
    """The link as a connection; an empty list if the other end does not know the key."""
    _limit_waiting(link, HANDSHAKE_SECONDS)
    connection = Connection(os.dup(link.fileno()))
    with link:
        try:
            if connection.recv_bytes(len(HELLO)) != HELLO:
                raise AuthenticationError
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
        except (AuthenticationError, EOFError, OSError):
            connection.close()
            return []
        _limit_waiting(link, 0)  # no limit
    return [connection]


def _limit_waiting(link: socket.socket, seconds: int) -> None:
    """Let each read of the socket, which a `Connection` may share, raise OSError after a time."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))


def help_main_process(processes: Processes, answers: Answers) -> None:
    """In the other processes, answer requests until the main process has no more, or has ended."""
    port, key = processes.from_main((0, b""))
    with (
        suppress(EOFError, ConnectionError),
        _connection((os.environ["MASTER_ADDR"], port), key) as connection,
    ):
        while (model := connection.recv()) is not None:
            for answered in answers(model, _requests(connection)):
                connection.send(answered)
            connection.send("finished")


def _connection(address: tuple[str, int], key: bytes) -> Connection:
    """Connect to `_connections`. Raises EOFError, ConnectionError, or AuthenticationError."""
    connection = Connection(socket.create_connection(address).detach())
    connection.send_bytes(HELLO)
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    return connection


def _requests(connection: Connection) -> Iterator[Request]:
    connection.send("next")
    while (request := connection.recv()) is not None:
        yield request
        connection.send("next")
