"""Registry of the formats of small sources: one literal. A new one is one file and one entry."""

from __future__ import annotations

from typing import Any

from quantize.formats.sources.float_quantized import FloatQuantized
from quantize.formats.sources.fp8 import Fp8
from quantize.formats.sources.mxfp4 import Mxfp4
from quantize.formats.sources.source import SourceFormat

SOURCE_FORMATS: tuple[SourceFormat, ...] = (Fp8(), FloatQuantized(), Mxfp4())


def source_format_in(section: Any) -> SourceFormat | None:
    """The format of a quantization_config; None for what is read in no such way."""
    if not isinstance(section, dict):
        return None
    return next((form for form in SOURCE_FORMATS if form.recognizes(section)), None)


def described(section: Any) -> str:
    """A quantization_config in a few words, for a message that refuses it."""
    if not isinstance(section, dict):
        return str(section)[:60]
    method = section.get("quant_method")
    words = [method if isinstance(method, str) else "no quant_method"]
    words += [str(section[key]) for key in ("format", "quant_algo") if section.get(key)]
    bits = section.get("bits", section.get("w_bit"))
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        bits = 4 if section.get("load_in_4bit") else 8
    if type(bits) is int:
        words.append(f"{bits}-bit")
    return " ".join(words)[:80]
