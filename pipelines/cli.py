"""The front door of every stage: quiet libraries, and one clear sentence when something is wrong."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import getpass
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from pipelines.config import ConfigError

log = logging.getLogger(__name__)

# Nothing phones home and nothing is looked up on a hub: everything works offline.
OFFLINE = {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
QUIET = {"DASK_LOGGING__DISTRIBUTED": "critical"}  # what matters of it reaches us as an exception

FORBIDDEN = {errno.EACCES, errno.EPERM}  # to read or to write
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, *FORBIDDEN}


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage. A :class:`ConfigError` becomes ``error: …`` on stderr and exit status 1, Ctrl-C status
    130."""
    os.environ.update(OFFLINE | QUIET)
    atexit.register(_end)
    try:
        getpass.getuser()
    except (KeyError, OSError):  # in a container under a bare number: DVC and MLflow ask for a name
        os.environ["LOGNAME"] = str(os.getuid())
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    for ours in ("pipelines", "__main__"):  # of libraries, warnings only
        logging.getLogger(ours).setLevel(logging.INFO)
    logging.addLevelName(logging.WARNING, "warning")
    logging.addLevelName(logging.INFO, "info")
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if (refused := _refused(error)) is None:
            raise
        if isinstance(refused, sqlite3.OperationalError):
            sys.exit(
                f"error: a database could not be written: {refused}. Make room or allow writing there, then "
                "run the same command again."
            )
        if refused.errno in FORBIDDEN:
            place = f": {refused.filename}" if refused.filename else ""
            sys.exit(
                f"error: a file could not be read or written{place}: {refused.strerror}. Allow it there, or "
                "run this as the user whose files they are, then run the same command again."
            )
        place = f" ({refused.filename})" if refused.filename else ""
        sys.exit(
            f"error: a file could not be written{place}: {refused.strerror}. Make room or allow writing "
            "there, then run the same command again; nothing was left half written."
        )
    sys.exit(0)


def _end() -> None:
    """Spare the search for garbage, which takes seconds; parts of torch would call what is left a leak."""
    if "torch" not in sys.modules:
        gc.freeze()


@contextlib.contextmanager
def bar() -> Iterator[Any]:
    """A bar for a training that runs by itself, called as ``tell``; it is closed before an error is said."""
    from tqdm import tqdm

    shown: Any = None

    def tell(cell: str, step: int, steps: int, loss: float) -> None:
        nonlocal shown
        if shown is None:  # not before there is something to show
            every = 0.5 if sys.stderr.isatty() else 30
            shown = tqdm(desc=cell, total=steps, initial=step, unit="step", mininterval=every)
        shown.set_postfix(loss=f"{loss:.3f}", refresh=False)
        shown.update(step - shown.n)

    try:
        yield tell
    finally:
        if shown is not None:
            shown.close()


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Say how long something took that was worth a second."""
    start = time.monotonic()
    yield
    if (seconds := time.monotonic() - start) >= 1:
        log.info("%s took %.0f s.", name, seconds)


def _refused(error: BaseException | None) -> OSError | sqlite3.OperationalError | None:
    """The refusal to read or write that an error is, or comes from: libraries wrap those of a database."""
    while error is not None:
        if isinstance(error, sqlite3.OperationalError):
            return error
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error
        error = error.__cause__
    return None
