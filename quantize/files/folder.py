"""Files of a model's folder: JSON that is read with suspicion, names and links that stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.errors import ModelError
from quantize.files import strict_json

# bytes, since all of a file is read; an index of 100,000 tensors has about ten MiB
_MAX_JSON = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object; ModelError names the file and what is wrong with it."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelError(
                f"{path}: larger than {_MAX_JSON >> 20} MiB, not a model's {path.name}"
            )
        if not path.is_file():  # reading a pipe would wait for ever
            raise ModelError(f"{path}: is no plain file; put the model's own {path.name} there")
        data = strict_json.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: not found; give a folder that holds a Hugging Face model"
        ) from None
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as err:  # ValueError: no UTF-8, no JSON, or a number of 4300 digits
        raise ModelError(f"{path}: cannot be read as JSON ({err})") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return data


def inside(folder: Path, path: Path) -> Path:
    """`path`, which lies in `folder`. ModelError for a link that leaves it, but to the Hub cache's
    blobs."""
    # The Hub cache links files to blobs beside the snapshot; anything else that
    # leaves the folder is refused.
    try:
        target, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):
        raise ModelError(f"{path}: is a link to itself; download it again") from None
    blobs = root.parent.parent / "blobs"
    if not target.is_relative_to(root) and target.parent != blobs:
        raise ModelError(
            f"{path}: links to {target}, outside the model folder; copy the file there instead"
        )
    return path


def is_file_name(name: str) -> bool:
    """Whether it is one plain name that file systems can hold: no path, no NUL, no lone surrogate,
    not too long."""
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
        return False
    try:
        return "\0" not in name and len(name.encode()) < 256
    except UnicodeEncodeError:
        return False
