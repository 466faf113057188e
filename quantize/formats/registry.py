"""Registry of output formats: one literal. A new format is one file and one entry of this tuple."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantize.formats.compressed_tensors import CompressedTensors
from quantize.formats.native import Native
from quantize.formats.output import OutputFormat, Section

if TYPE_CHECKING:
    from quantize.formats.scheme import AnyScheme

FORMATS: dict[str, OutputFormat] = {form.name: form for form in (CompressedTensors(), Native())}
"""By the name that recipes and config.json give them."""
DEFAULT = CompressedTensors.name


def format_in(section: Any) -> OutputFormat | None:
    """The format that wrote a quantization_config; None for what is none of ours."""
    if not isinstance(section, dict):
        return None
    return next((form for form in FORMATS.values() if form.recognizes(section)), None)


def schemes_in(section: Section, linears: Sequence[str]) -> dict[str, AnyScheme]:
    """Full linear names → scheme, of a quantization_config that pq reads; empty for an empty one.

    ValueError, KeyError, TypeError or AttributeError for what cannot be read.
    """
    if not section:
        return {}
    form = format_in(section)
    if form is None:
        raise ValueError(f"quant_method {section['quant_method']!r} is unknown")
    return form.schemes(section, linears)
