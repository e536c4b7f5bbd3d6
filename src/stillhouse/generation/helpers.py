"""Lets the other processes of a torchrun answer requests for the main process, which owns the
journal.

Each process loads its own copy of the model. It requests work when it has room, and sends each
answer back immediately, so a kill loses only the answers being generated, as with one process. They
communicate by multiprocessing.connection, with a key that only these processes know.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

from stillhouse.errors import LostProcessError
from stillhouse.generation.request import Outcome, Request
from stillhouse.process_watch import NOTICE_SECONDS, lost_process_found
from stillhouse.shared_work import Processes

Next = Callable[[], Request | None]
Arrived = Callable[[Request, Outcome], object]
Answers = Callable[[Any, Iterator[Request]], Iterator[tuple[Request, Outcome]]]
"""(description of a model, requests) → each request with its outcome."""


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
    with Listener(("", 0), backlog=processes.count) as listener:
        processes.from_main((listener.address[1], key))
        helpers = Helpers(list(islice(_known(listener, key), processes.count - 1)))
    try:
        yield helpers
    finally:
        helpers.close()


def _known(listener: Listener, key: bytes) -> Iterator[Connection]:
    """Connections from processes that know the key; others, as of a port scanner, are ignored."""
    while True:
        connection = listener.accept()
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
        except (AuthenticationError, EOFError, OSError):
            connection.close()
        else:
            yield connection


def help_main_process(processes: Processes, answers: Answers) -> None:
    """In the other processes, answer requests until the main process has no more, or has ended."""
    port, key = processes.from_main((0, b""))
    with (
        suppress(EOFError, ConnectionError),
        Client((os.environ["MASTER_ADDR"], port), authkey=key) as connection,
    ):
        while (model := connection.recv()) is not None:
            for answered in answers(model, _requests(connection)):
                connection.send(answered)
            connection.send("finished")


def _requests(connection: Connection) -> Iterator[Request]:
    connection.send("next")
    while (request := connection.recv()) is not None:
        yield request
        connection.send("next")
