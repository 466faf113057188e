"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantize.cost.units import parse_bytes
from quantize.errors import UsageError

if TYPE_CHECKING:
    from quantize.evaluation.protocols import Bos
    from quantize.model.attention_cache import CacheNumerics

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Model folder, or Hub id org/name."),
]
Revision = Annotated[
    str | None,
    typer.Option(
        help="Branch, tag or commit of a Hub id; default: its main branch. org/name@REVISION says the same."
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option(help="The parent, run in the same pass: a folder or org/name@REVISION."),
]
ProtocolOption = Annotated[
    str | None,
    typer.Option("--protocol", help="strided (default) or rolling."),
]
Dataset = Annotated[
    str | None,
    typer.Option(help="Text: builtin (held-out part), a file, or a Hub set."),
]
TextField = Annotated[
    str | None,
    typer.Option(
        help="Column of json, jsonl, parquet and Hub rows that holds text or chats; default: "
        "recognized (text, messages, conversations, instruction and output and their like)."
    ),
]
ChatTemplate = Annotated[
    bool | None,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Render rows with the tokenizer's chat template, plain text as one user turn, or write "
        "chats plainly; default: chats are rendered where it has one.",
    ),
]
Seqlen = Annotated[int, typer.Option(min=2, help="Window length in tokens.")]
Context = Annotated[
    int,
    typer.Option(min=0, help="Tokens that strided windows share, read but not scored."),
]
BosOption = Annotated[
    str,
    typer.Option(
        "--bos",
        help="Whether what is read begins with BOS: auto (where the tokenizer adds it), always, "
        "never. Rolling windows always do.",
    ),
]
CalibrationBos = Annotated[
    str | None,
    typer.Option(
        "--bos",
        help="Whether calibration windows begin with BOS: auto (where the tokenizer adds it), "
        "always, never.",
    ),
]
MaxWindows = Annotated[int | None, typer.Option(min=1, help="Evaluate only the first windows.")]
NumericsOption = Annotated[
    str,
    typer.Option(
        "--numerics",
        help="kernel: emulate the INT4xFP8 kernel; stock: compute as transformers loads it.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="Computing dtype: auto, float32, bfloat16, float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")]


KvCache = Annotated[
    str,
    typer.Option(
        "--kv-cache",
        help="auto: as the checkpoint says; int4: emulate pq's, and FP8 queries; vllm-int4: vLLM's "
        "int4_per_token_head.",
    ),
]


def size_option(name: str, text: str | None) -> int | None:
    """Bytes of an option such as 6GB; UsageError for what is no size."""
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as err:
        raise UsageError(f"{name}: {err}") from None


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
