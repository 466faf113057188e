"""What a file system refuses, said in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from quantize.errors import OutputError


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn what a file system can refuse into one line about `path`."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path}: no space left on the disk; free some or give another --output") from None
        raise OutputError(f"{path}: cannot be written ({err.strerror or err})") from None
    except SafetensorError as err:
        full = "No space left" in str(err)
        reason = "no space left on the disk; free some or give another --output" if full else f"not written ({err})"
        raise OutputError(f"{path}: {reason}") from None
