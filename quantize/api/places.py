"""Where a model lies and what it is computed on, told from what a user writes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import ModelError, UsageError

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]
"""Called with a line for people."""
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""
VERBOSE = "PQ_VERBOSE"
"""Set where the libraries' warnings are to be shown: `-v`."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def silent(line: str) -> None:
    """Say nothing."""


def unseen(what: str, done: int, total: int) -> None:
    """Show no progress."""


def quiet_libraries() -> None:
    """Keep the progress bars and advice of the libraries below us off the
    terminal, but for the warnings with `-v`; errors still raise.

    With this they are loaded: from here on garbage is collected again.
    """
    import gc
    import logging

    from quantize.model.transformers_api import silence

    silence(warnings=bool(os.environ.get(VERBOSE)))
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    gc.enable()


def pick_device(name: str | torch.device, local_rank: int | None = None) -> torch.device:
    """`auto` is the first CUDA device, else the CPU; UsageError for one that is not there.

    local_rank: the CUDA device that is meant by none in particular, and
    which is made the current one.
    """
    import torch

    if name == "auto":
        # accelerate launch --cpu
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        name = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and local_rank is not None:
            device = torch.device("cuda", local_rank) if device.index is None else device
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise UsageError(
            f"--device {name}: not usable here ({str(err).splitlines()[0]}); try --device cpu",
        ) from None
    return device


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` computes in float32 on a CPU and in bfloat16 on an accelerator."""
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = str(name).removeprefix("torch.")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in names:
        raise UsageError(f"--dtype {name}: choose one of auto, {', '.join(names)}")
    return names[name]


def local_model(
    model: str | Path, revision: str | None = None, say: Say = silent, bars: bool = False
) -> Path:
    """A model folder: `model` itself, or what the Hub's cache holds of `org/name`, which may end with
    `@` and a revision. Only a Hub id touches the network.

    revision: branch, tag or commit of a Hub id. say: told what is fetched. bars: whether to show
    progress bars on stderr. ModelError, UsageError.
    """
    model = str(model)
    folder = Path(model).expanduser()
    try:
        there = bool(model) and folder.is_dir()
    except OSError as err:
        raise ModelError(
            f"{model[:80]}: cannot be opened ({err.strerror}); give a local model folder",
        ) from None
    if there:
        if revision is not None:
            raise UsageError(
                f"--revision {revision}: {model} is a local folder, which has none; leave it out, "
                "or give a Hub id"
            )
        return folder
    name, at, wanted = model.partition("@")
    if folder.exists() or not _HUB_NAME.fullmatch(name):
        raise ModelError(
            f"{model}: no such folder; give a local model folder or a Hub id (org/name)",
        )
    if at and (revision or not wanted):
        problem = f"--revision {revision} and" if revision else "no revision behind"
        raise UsageError(f"{problem} {model}; name the revision once, as org/name@REVISION")
    from quantize.files.hub import fetch

    return fetch(name, revision or wanted or None, say, bars=bars)
