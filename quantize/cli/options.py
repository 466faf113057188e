"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from quantize.api.choices import bos_choice, check_choices, kv_numerics, size_option

__all__ = ["bos_choice", "check_choices", "kv_numerics", "size_option"]

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
        help="auto: as the checkpoint says; int4: emulate it, and FP8 queries.",
    ),
]
