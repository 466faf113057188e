"""Round to nearest: the data-free baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from quantize.methods.encode import IntEncode, encode_nearest, note_errors

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.block.moments import Moments


class Rtn(IntEncode):
    """Round every weight to the nearest code of its group; needs no calibration text."""

    method: Literal["rtn"] = "rtn"
    clip: Literal["absmax", "mse"] = "absmax"
    """`absmax`: the group's largest weight fits; `mse`: clip where that lowers
    the group's squared error."""

    @property
    def needs_inputs(self) -> bool:
        """Data-free."""
        return False

    def fitting(self, N: int, K: int) -> int:
        """Codes, values and the packed form."""
        return 20 * N * K

    def encode_group(self, block: Block, names: Sequence[str], moments: Moments | None) -> None:
        """Encode linears one by one."""
        for name in names:
            weight = block.linear(name).weight.float()
            note_errors(
                block,
                name,
                weight,
                encode_nearest(block, name, self.grid(block, name), self.clip == "mse", self.fp8),
            )
