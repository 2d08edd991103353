"""No network: a Python process with this folder in PYTHONPATH is refused every connection but those to this
machine, and notes it in the file that ATTEMPTS names."""

import os
import socket
from pathlib import Path
from typing import Any

HERE = {"127.0.0.1", "localhost", b"127.0.0.1", b"localhost"}


def _note(what: Any) -> OSError:
    if place := os.environ.get("ATTEMPTS"):
        with Path(place).open("a") as file:
            file.write(f"{what!r}\n")
    return OSError("no network here")


def _checked(connect: Any) -> Any:
    def to(self: socket.socket, address: Any) -> Any:
        if self.family == socket.AF_UNIX or address[0] in HERE:
            return connect(self, address)
        raise _note(address)

    return to


def _only_here(host: Any, *more: Any, **named: Any) -> Any:
    if host in HERE:
        return _look_up(host, *more, **named)
    raise _note(host)


_look_up = socket.getaddrinfo
socket.socket.connect = _checked(socket.socket.connect)  # type: ignore[method-assign]
socket.socket.connect_ex = _checked(socket.socket.connect_ex)  # type: ignore[method-assign]
socket.getaddrinfo = _only_here
