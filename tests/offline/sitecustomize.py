"""No network: a Python process with this folder in PYTHONPATH is refused every connection, and notes it in
the file that ATTEMPTS names."""

import os
import socket
from pathlib import Path
from typing import Any


def _note(what: Any) -> OSError:
    if place := os.environ.get("ATTEMPTS"):
        with Path(place).open("a") as file:
            file.write(f"{what!r}\n")
    return OSError("no network here")


def _refuse(self: socket.socket, address: Any) -> Any:
    if self.family == socket.AF_UNIX:
        return _connect(self, address)
    raise _note(address)


def _nowhere(host: Any, *_: Any, **__: Any) -> Any:
    raise _note(host)


_connect = socket.socket.connect
socket.socket.connect = _refuse  # type: ignore[method-assign]
socket.socket.connect_ex = _refuse  # type: ignore[method-assign]
socket.getaddrinfo = _nowhere
