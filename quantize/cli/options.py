"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantize.api.choices import (
    CHECK_WINDOWS,
    bos_choice,
    check_choices,
    kv_numerics,
    resume_mode,
    size_option,
)
from quantize.cli import complete

__all__ = [
    "CHECK_WINDOWS",
    "bos_choice",
    "check_choices",
    "kv_numerics",
    "resume_mode",
    "size_option",
]

_BOS = complete.words("auto", "always", "never")
_DTYPES = complete.words("auto", "float32", "bfloat16", "float16")
_DEVICES = complete.words("auto", "cpu", "cuda", "mps")

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Model folder, or Hub id org/name.",
        autocompletion=complete.models,
    ),
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
    typer.Option(
        "--protocol",
        help="strided (default) or rolling.",
        autocompletion=complete.words("strided", "rolling"),
    ),
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
        autocompletion=_BOS,
    ),
]
CalibrationBos = Annotated[
    str | None,
    typer.Option(
        "--bos",
        help="Whether calibration windows begin with BOS: auto (where the tokenizer adds it), "
        "always, never.",
        autocompletion=_BOS,
    ),
]
CheckWindows = Annotated[
    int,
    typer.Option(
        min=0,
        help="Windows, none of them calibration's, that the output and its parent are compared on at the end; "
        "0: none.",
    ),
]
MaxWindows = Annotated[int | None, typer.Option(min=1, help="Evaluate only the first windows.")]
NumericsOption = Annotated[
    str,
    typer.Option(
        "--numerics",
        help="kernel: emulate the INT4xFP8 kernel; stock: compute as transformers loads it.",
        autocompletion=complete.words("kernel", "stock"),
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", autocompletion=_DEVICES)]
Dtype = Annotated[
    str,
    typer.Option(help="Computing dtype: auto, float32, bfloat16, float16.", autocompletion=_DTYPES),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")]


KvCache = Annotated[
    str,
    typer.Option(
        "--kv-cache",
        help="auto: as the checkpoint says; int4: emulate pq's, and FP8 queries; vllm-int4: vLLM's "
        "int4_per_token_head.",
        autocompletion=complete.words("auto", "int4", "vllm-int4"),
    ),
]


# What `pq convert` takes, and `pq estimate` with it.

Recipe = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        help="Shipped recipe, a scheme (w4a16, w4a8, w4a8kv4, w3a16, w2a16: the best recipe for it), or "
        "path of a YAML file.",
        autocompletion=complete.recipes,
    ),
]
CalibrationDataset = Annotated[
    str | None, typer.Option(help="Calibration text: builtin, a file, or a Hub set.")
]
CalibrationWindows = Annotated[int | None, typer.Option(help="Calibration windows.")]
CalibrationSeqlen = Annotated[int | None, typer.Option(help="Tokens per calibration window.")]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Seed of the calibration draw: of documents. A single text (.txt, builtin) gives its first windows."
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change a stage field, e.g. bits=3 or activations=none. Repeatable."
    ),
]
TargetBpw = Annotated[
    float | None,
    typer.Option(
        help="Mean bits per weight of the quantized linears, scales counted, e.g. 4.5: those that suffer most from "
        "rounding, measured on calibration text, get 8 bits (activations: none) instead of "
        "the recipe's own."
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps what is done (blocks, layers that LaDiMo taught), so that a stopped run takes it "
        "up; default: OUTPUT.work, removed when the output is there."
    ),
]
ResumeOption = Annotated[
    str,
    typer.Option(
        "--resume",
        help="auto: go on after the last block that a stopped run of the same model, recipe, text and versions "
        "finished, else start anew; required: refuse to start anew; never: start anew and "
        "keep no blocks. Several processes (accelerate launch, torchrun) may go on from what "
        "any number of them kept.",
        autocompletion=complete.words("auto", "required", "never"),
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Let the output take the place of one that pq wrote, when it is done; anything else stays.",
    ),
]
StrictServing = Annotated[
    bool,
    typer.Option(
        "--strict-serving",
        help="Refuse a recipe (exit code 3) of whose output vLLM would not serve something on any GPU without an "
        "optional package, instead of saying so and going on.",
    ),
]
MaxRam = Annotated[
    str | None,
    typer.Option(
        help="Most memory of the process, e.g. 6GB. Hidden states go to the disk, blocks are split by linear and "
        "passes get smaller, as far as that needs; where nothing suffices, exit code 8 and "
        "what would."
    ),
]
MaxVram = Annotated[str | None, typer.Option(help="The same for the accelerator's memory.")]
ConversionDevice = Annotated[
    str,
    typer.Option(
        "--device",
        help="auto, cpu, cuda (in a launch the process's own), cuda:1, mps.",
        autocompletion=_DEVICES,
    ),
]
