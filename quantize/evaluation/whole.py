"""Models that are held whole in memory, as transformers loads them: types that pq cannot stream, and
what other tools quantized in ways that pq does not read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantize.evaluation.model import Logits, Span, Tick
from quantize.files.headers import noted_shapes, tensor_headers
from quantize.model.dequantized import open_source
from quantize.model.positions import require_positions
from quantize.model.storage import Storage, storage_of
from quantize.model.transformers_api import logits_of

if TYPE_CHECKING:
    from quantize.parallel.ranks import Ranks


class WholeModel:
    """A checkpoint that transformers has loaded."""

    units = 1
    kv_cache = "16-bit"
    kv_bits = 16.0
    activated_parameters = None
    experts_visited: Mapping[str, float] = MappingProxyType({})
    """Experts of an unknown architecture are not counted."""

    def __init__(self, folder: Path, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.model = model
        source = open_source(folder)
        headers = tensor_headers(source)
        stored = storage_of(
            headers, source.config.get("quantization_config"), noted_shapes(source, headers)
        )
        small = [one for one in stored.values() if one.quantized]
        weights = sum(one.weights or 0 for one in small)
        known = weights and all(one.weights for one in small)
        self.bits_per_weight = 8 * sum(one.bytes for one in small) / weights if known else None
        self.activation_bits = _activation_bits(small)
        self.bytes_per_token = _bytes_met({n: h.bytes for n, h in headers.items()}, model)

    def require_positions(self, length: int) -> None:
        """UsageError where the model cannot read so many tokens at once."""
        require_positions(self.model, length)

    def hidden_bytes(self, tokens: int) -> int:
        """Nothing is held between windows."""
        return 0

    def count_together(self, ranks: Ranks) -> None:
        """Nothing is counted."""

    def read(self, inputs: Tensor, tick: Tick) -> Logits:
        """Nothing is computed before logits over inputs [B, T] int64 are asked for."""

        @torch.no_grad()
        def logits(spans: Sequence[Span]) -> Iterator[Tensor]:
            last, out = -1, torch.empty(0)
            for window, first, end in spans:
                if window != last:
                    batch = inputs[window : window + 1].to(self.device)
                    last, out = window, logits_of(self.model, batch)[0]
                yield out[first:end]

        tick()
        return logits


def _activation_bits(small: Sequence[Storage]) -> tuple[int, ...]:
    """What inputs of quantized linears are rounded to, as config.json says."""
    found = (re.search(r"\d+", one.activations) for one in small)
    return tuple(sorted({int(bits[0]) if bits else 16 for bits in found} or {16}))


def _bytes_met(stored: Mapping[str, int], model: nn.Module) -> float | None:
    """Bytes of the stored tensors that a token is multiplied with; None for a model with experts,
    of which it meets some."""
    modules = dict(model.named_modules())
    if any("expert" in name for name in modules):
        return None
    table = model.get_input_embeddings()  # type: ignore[operator]  # every transformers model has it
    name = next(name for name, module in modules.items() if module is table)
    of_table = sum(size for key, size in stored.items() if key.startswith(f"{name}."))
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and getattr(head, "weight", None) is table.weight
    return float(sum(stored.values()) - (0 if tied else of_table))
