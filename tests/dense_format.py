"""An output format that pq does not have: weights as their codes make them, in bfloat16, for any loader at all.

All of it is in this file. Tests add it to the registry; nothing else of the project knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantize.formats.output import Finished, OutputFormat
from quantize.formats.scheme import Packed


class Dense(OutputFormat):
    name = "dense"
    about = "loads anywhere"

    def tensors(self, packed: Mapping[str, Packed], plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = {f"{name}.weight": weight.unpack().to(torch.bfloat16) for name, weight in packed.items()}
        return weights | {name: tensor for name, tensor in plain.items() if not name.endswith(".kv.scale")}

    def config_section(self, model: Finished) -> dict[str, Any] | None:
        return None
