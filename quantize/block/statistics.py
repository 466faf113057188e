"""What a conversion saw, for the report: outliers before and after smoothing, and weights
against their code points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantize.block.block import Block
from quantize.block.capture import inputs_of
from quantize.block.histogram import BINS, SPAN
from quantize.model.arch import Role

STATISTICS = "pq-statistics.json"
"""Name of the file beside the weights."""

PROFILED_TOKENS = 4096
"""Calibration tokens that the input profiles are taken from: more hardly change
a channel's largest value."""
# Largest channels that are named: outliers are few, and the file holds them for every group.
_TOP = 8


def profile(block: Block) -> dict[str, dict[str, Any]]:
    """Outliers of a block as it is now.

    inputs: for each group of linears with one input, named by its first: absmax, p99 and median
    over channels of max |x|, and the largest channels (absent without calibration text). weights:
    absmax, rms and kurtosis of each.
    """
    weights = {
        name: _weight(block.linear(name).weight)
        for group in block.arch.calibration_order
        for name in group
    }
    return {"inputs": _inputs(block), "weights": weights} if block.inputs else {"weights": weights}


def _weight(weight: Tensor) -> dict[str, float]:
    w = weight.float()
    square = w.square()
    rms = float(square.mean().sqrt())
    fourth = float(square.square().mean())
    return {
        "absmax": _short(w.abs().max()),
        "rms": _short(rms),
        "kurtosis": _short(fourth / rms**4 if rms else 0.0),
    }


def _short(value: Tensor | float) -> float:
    """Six digits: the file is read by people and plotted."""
    return float(f"{float(value):.6g}")


def _inputs(block: Block) -> dict[str, dict[str, Any]]:
    names = [group[0] for group in block.arch.calibration_order]
    maxima: dict[str, Tensor] = {}
    tokens = dict.fromkeys(names, 0)
    for inputs in inputs_of(block, names):
        for name, x in zip(names, inputs, strict=True):
            # A routed expert may see no token.
            finite = torch.where(x.isfinite(), x, 0).abs()
            largest = finite.amax(dim=0) if len(x) else x.new_zeros(x.shape[1])
            maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest
            tokens[name] += len(x)
        del inputs, x  # before the next pass, which takes most
        if tokens[names[0]] >= PROFILED_TOKENS:
            break
    return {name: _channels(largest, tokens[name]) for name, largest in maxima.items()}


def _channels(largest: Tensor, tokens: int) -> dict[str, Any]:
    ordered = largest.sort()
    channels = ordered.indices.flip(0)[:_TOP].tolist()
    values = ordered.values.flip(0)[:_TOP].tolist()
    top = zip(channels, values, strict=True)
    at = (len(largest) - 1) * 99 // 100
    return {
        "absmax": _short(ordered.values[-1]),
        "p99": _short(ordered.values[at]),
        "median": _short(ordered.values[(len(largest) - 1) // 2]),
        "tokens": tokens,
        "top": [[channel, _short(value)] for channel, value in top],
    }


@dataclass
class Collected:
    """Statistics of a whole run. Histograms and points are those of linears of one
    role, bits and group size."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    histograms: dict[tuple[Role, int, int], Tensor] = field(default_factory=dict)
    """Counts [96] of `code_histogram`, summed."""
    points: dict[tuple[Role, int, int], list[Tensor]] = field(default_factory=dict)
    """Values of the codes [2^bits], of each linear."""

    def add(self, block: Block, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Take what is known about a finished block: profiles before and after its
        smooth stages, and histograms."""
        pairs = {
            kind: {
                name: {"before": facts, "after": after[kind][name]}
                for name, facts in before[kind].items()
            }
            for kind in before
        }
        self.blocks.append({"index": block.index, **pairs})
        for name, counts in block.histograms.items():
            packed = block.packed[name]
            key = (block.arch.roles[name], packed.bits, packed.group_size)
            self.histograms[key] = (
                self.histograms[key] + counts if key in self.histograms else counts
            )
            self.points.setdefault(key, []).append(packed.points().cpu())

    def as_json(self) -> dict[str, Any]:
        """Contents of pq-statistics.json."""
        histograms = {}
        for (role, bits, group_size), counts in self.histograms.items():
            edge = SPAN * 2 ** (bits - 1)
            key = f"{role}/{bits}"
            if key in histograms:  # linears of one role with different numbers of inputs
                key = f"{key}/{group_size}"
            histograms[key] = {
                "role": role,
                "bits": bits,
                "group_size": group_size,
                "edges": [edge * (2 * i / BINS - 1) for i in range(BINS + 1)],
                "counts": counts.tolist(),
                "points": [
                    _short(p) for p in torch.stack(self.points[role, bits, group_size]).mean(dim=0)
                ],
            }
        return {"blocks": self.blocks, "histograms": histograms}
