"""A folder that one process at a time works in."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from quantize.errors import OutputError

log = logging.getLogger(__name__)


def lock_folder(folder: Path, name: str) -> int:
    """Take the folder for this process → handle that holds it until it is
    closed, or the process dies."""
    path = folder / name
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 32).decode(errors="replace")
            os.close(handle)
            raise OutputError(
                f"{folder}: process {owner or '?'} is at work there; wait until it is done"
            ) from None
        except OSError as err:  # file systems without locks
            log.warning(
                "%s: cannot be locked (%s); start no second process on it", folder, err.strerror
            )
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            try:
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
            except OSError:
                path.unlink()
                os.close(handle)
                raise
            return handle
        os.close(handle)  # its owner removed it between the two lines above
