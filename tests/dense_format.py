"""An output format that pq does not have: weights as their codes make them, in bfloat16.

All of it is in this file. Tests add it to the registry; nothing else of the project knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantize.formats.output import Finished, OutputFormat
from quantize.formats.scheme import Packed


class Dense(OutputFormat):
    name = "dense"
    about = "loads anywhere"

    def tensors(
        self,
        packed: Mapping[str, Packed],
        plain: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        out = {f"{name}.weight": weight.unpack().bfloat16() for name, weight in packed.items()}
        return out | {name: t for name, t in plain.items() if not name.endswith(".kv.scale")}

    def config_section(self, model: Finished) -> dict[str, Any] | None:
        return None
