"""Arguments that several functions and commands share: what their values mean, and what is wrong
with others. Messages name them as the commands do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, get_args

from quantize.cost.units import parse_bytes
from quantize.errors import UsageError

if TYPE_CHECKING:
    from quantize.evaluation.protocols import Bos
    from quantize.files.resume import Resume
    from quantize.model.attention_cache import CacheNumerics

CHECK_WINDOWS = 4
"""Held-out windows that a conversion is measured on: enough to tell a good one from a bad one; with
windows of 512 tokens half a pass of each model."""
Assignments = Mapping[str, object] | Sequence[str]
"""Stage fields to change: {"bits": 3, "fireq.damping": 0.05}, or ["bits=3"] as on the command line."""
Names = str | Sequence[str]
"""Several names: a list, or one text with commas between them."""


def assignments_of(given: Assignments | None) -> list[str]:
    """Stage fields to change, as `--set` writes them."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping):
        return [f"{field}={_written(value)}" for field, value in given.items()]
    return list(given or ())


def _written(value: object) -> str:
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return ",".join(map(_written, value))
    return str(value)


def names_of(given: Names | None) -> list[str]:
    """Names, each without blanks around it; empty ones are left out."""
    parts = (given or "").split(",") if given is None or isinstance(given, str) else given
    return [name.strip() for name in parts if name.strip()]


def pairs_of(given: Mapping[str, object] | str) -> dict[str, str]:
    """Arguments of lm-eval's model: a mapping, or k=v,k=v; UsageError for what is neither."""
    if not isinstance(given, str):
        return {key: str(value) for key, value in given.items()}
    pairs = {}
    for item in names_of(given):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--model-args {item}: write key=value, separated by commas")
        pairs[key.strip()] = value.strip()
    return pairs


def size_option(name: str, text: str | int | None) -> int | None:
    """Bytes of an option such as 6GB; UsageError for what is no size."""
    if text is None or isinstance(text, int):
        return text
    try:
        return parse_bytes(text)
    except ValueError as err:
        raise UsageError(f"{name}: {err}") from None


def resume_mode(asked: str) -> Resume:
    """The choice that --resume names; UsageError for another."""
    from quantize.files.resume import Resume

    mode: Resume | None = next((known for known in get_args(Resume) if known == asked), None)
    if mode is None:
        raise UsageError(f"--resume {asked}: choose {', '.join(get_args(Resume))}")
    return mode


def kv_numerics(choice: str) -> CacheNumerics | None:
    """What --kv-cache asks for; UsageError for anything else."""
    if choice not in ("auto", "int4", "vllm-int4"):
        raise UsageError(f"--kv-cache {choice}: choose auto, int4 or vllm-int4")
    if choice == "auto":
        return None
    from quantize.formats.kv4 import KvNumerics, KvScheme
    from quantize.formats.vllm_kv4 import VllmInt4

    return KvNumerics(KvScheme(symmetric=False)) if choice == "int4" else VllmInt4()


def bos_choice(text: str) -> Bos:
    """The choice that --bos names; UsageError for another."""
    from quantize.evaluation.protocols import BOS

    for known in BOS:
        if text == known:
            return known
    raise UsageError(f"--bos {text}: choose {', '.join(BOS)}")


def check_choices(protocol: str | None, numerics: str) -> None:
    """UsageError for a protocol or numerics that do not exist."""
    if numerics not in ("kernel", "stock"):
        raise UsageError(f"--numerics {numerics}: choose kernel or stock")
    if protocol not in (None, "strided", "rolling"):
        raise UsageError(f"--protocol {protocol}: choose strided or rolling")
