"""What is asked of a conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from quantize.cost.peak import available, require_below
from quantize.files.offload import Place
from quantize.files.resume import Resume
from quantize.parallel.ranks import ALONE, Ranks
from quantize.recipe.recipe import Recipe

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, blocks done, blocks in all)."""


@dataclass(frozen=True)
class Request:
    """What to convert, how, and where to."""

    model: Path
    recipe: Recipe
    output: Path
    device: torch.device
    dtype: torch.dtype
    batch_tokens: int = 4096
    """Calibration tokens per forward pass; bounds the memory of one pass."""
    states_on: Place = "device"
    """Where hidden states wait between two blocks."""
    split: bool = False
    """Whether the weights of a block are put away, all but those of the
    linear that is worked on."""
    hold: int | None = None
    """Bytes that passes may take which wait in a block for its linears to be encoded; those that
    find no room are run from the start again. None: half of what is free."""
    work: Path | None = None
    """Folder that keeps what took long, so that a stopped run need not do it
    again; None: nothing is kept."""
    resume: Resume | None = None
    """Whether to go on from the last block that a stopped run kept in `work`, and to
    keep every block that is done;
    None: no block is kept, and what another run kept is left alone."""
    overwrite: bool = False
    """Whether the output takes the place of one that pq wrote."""
    target_bpw: float | None = None
    """Overrides the recipe's `target_bpw`."""
    strict_serving: bool = False
    """Whether what no GPU serves in vLLM is an error, before any work."""
    check_windows: int = 0
    """Windows that the output and its parent are compared on before it appears, none of them those
    of calibration; 0: no look is taken."""
    unchecked: str = ""
    """Why none is taken though it was asked for."""
    max_ram: int | None = None
    """Bytes that the process should stay below; `quantize.conversion.estimate.within` sees to it."""
    max_vram: int | None = None
    """The same of an accelerator's memory."""
    ranks: Ranks = ALONE
    """The processes that do it together; the first alone reads the text and writes."""

    @property
    def holds(self) -> int:
        """Bytes that passes may take which wait (`hold`)."""
        if self.split or self.states_on == "disk":
            return 0  # where memory is short, it is not for what can be computed again
        if self.hold is not None:
            return self.hold
        # Processes on one machine share its memory; each has a GPU of its own.
        sharing = self.ranks.size if self.device.type == "cpu" else 1
        return available(self.device) // 2 // sharing

    def require_room(self) -> None:
        """RoomError where more memory was taken than the limit of the
        device that computes allows."""
        require_below(self.max_vram if self.device.type == "cuda" else self.max_ram, self.device)
