"""Registry of output formats: one literal. A new format is one file and one entry of this tuple."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantize.formats.compressed_tensors import CompressedTensors
from quantize.formats.gguf.format import Gguf
from quantize.formats.native import Native
from quantize.formats.output import OutputFormat, Section

if TYPE_CHECKING:
    from pathlib import Path

    from quantize.files.checkpoint import Checkpoint
    from quantize.formats.scheme import AnyScheme

FORMATS: dict[str, OutputFormat] = {
    form.name: form for form in (CompressedTensors(), Native(), Gguf())
}
"""By the name that recipes and config.json give them."""
DEFAULT = CompressedTensors.name


def format_in(section: Any) -> OutputFormat | None:
    """The format that wrote a quantization_config; None for what is none of ours."""
    if not isinstance(section, dict):
        return None
    return next((form for form in FORMATS.values() if form.recognizes(section)), None)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint as its format reads it, whatever files that takes; ModelError as `Checkpoint`."""
    from quantize.files.checkpoint import Checkpoint, unreadable
    from quantize.files.folder import inside, read_json

    path = folder / "config.json"
    try:
        if not path.is_file():
            return Checkpoint(folder)  # says what is missing
        section: Any = read_json(inside(folder, path)).get("quantization_config")
    except OSError:
        return Checkpoint(folder)  # which says that it cannot be read
    form = format_in(section)
    if form is None:
        return Checkpoint(folder)
    try:
        return form.open(folder, section)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise unreadable(folder, err) from None


def scheme_of(entry: Mapping[str, Any]) -> AnyScheme:
    """Undo a scheme's `as_json`, whatever its layout; ValueError for one that pq does not write."""
    from quantize.formats.gguf.blocks import KINDS, BlockScheme
    from quantize.formats.native import scheme_from_json

    blocks = entry.get("format") in KINDS
    return BlockScheme.from_json(entry) if blocks else scheme_from_json(entry)


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
