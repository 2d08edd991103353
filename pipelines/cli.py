"""The front door of every stage: quiet libraries, and one clear sentence when something is wrong."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import sys
from collections.abc import Callable
from typing import NoReturn

from pipelines.config import ConfigError

# Nothing phones home and nothing is looked up on a hub: everything works offline.
OFFLINE = {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage. A :class:`ConfigError` becomes ``error: …`` on stderr and exit status 1, Ctrl-C status
    130."""
    os.environ.update(OFFLINE)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.addLevelName(logging.WARNING, "warning")
    logging.addLevelName(logging.INFO, "info")
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except sqlite3.OperationalError as error:
        sys.exit(
            f"error: a database could not be written: {error}. Make room or allow writing there, then run "
            "the same command again."
        )
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        place = f" ({error.filename})" if error.filename else ""
        sys.exit(
            f"error: a file could not be written{place}: {error.strerror}. Make room or allow writing there, "
            "then run the same command again; nothing was left half written."
        )
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
