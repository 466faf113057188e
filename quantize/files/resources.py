"""Where shipped data lies: inside the installed package, else beside it
(editable install, checkout)."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def data_dir(name: str) -> Path:
    """Return the folder `recipes`, `calib_data` or `eval`, whatever the working directory is.

    Raises FileNotFoundError when the installation lacks it.
    """
    for root in (_PACKAGE / "_data", _PACKAGE.parent):
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(
        f"{name}/ is neither in {_PACKAGE / '_data'} nor beside the package; reinstall pq"
    )
