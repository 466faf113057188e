"""What a run has done so far. Every field is kept for a run that goes on after a stop, by its type
alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quantize.block.statistics import Collected
from quantize.cost.peak import Cost
from quantize.formats.routing import Policy
from quantize.formats.scheme import AnyScheme


@dataclass
class State:
    """What was encoded so far and what is known about it; names are full names of modules."""

    schemes: dict[str, AnyScheme] = field(default_factory=dict)
    """Of every encoded linear."""
    rotated_inputs: list[str] = field(default_factory=list)
    """Linears that rotate their inputs at run time."""
    routing: dict[str, Policy] = field(default_factory=dict)
    """Of every FFN with experts."""
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Facts (JSON data) for the provenance, by linear, edge or method."""
    costs: dict[str, Cost] = field(default_factory=dict)
    """What single parts took."""
    statistics: Collected = field(default_factory=Collected)
    stored_bits: float = 0.0
    """Of all encoded weights, scales counted."""
    weights: int = 0
    """Encoded weights."""
    source_bytes: int = 0
    untied_head_bytes: int = 0
    """What a head takes that shared the embedding's weight and got one of its own."""

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits of a quantized weight, scales counted."""
        return self.stored_bits / self.weights if self.weights else 16.0
