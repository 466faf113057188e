"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from quantize.cli import complete
from quantize.cost.units import parse_bytes
from quantize.errors import UsageError

if TYPE_CHECKING:
    from quantize.evaluation.protocols import Bos
    from quantize.files.resume import Resume
    from quantize.model.attention import KvNumerics

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
CHECK_WINDOWS = 4
"""Enough to tell a good conversion from a bad one; with windows of 512 tokens half a pass of each
model."""
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
        help="auto: as the checkpoint says; int4: emulate it, and FP8 queries.",
        autocompletion=complete.words("auto", "int4"),
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
Seed = Annotated[int | None, typer.Option(help="Seed of the calibration draw.")]
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


def resume_mode(asked: str) -> Resume:
    """What --resume asks for; UsageError for anything else."""
    from quantize.files.resume import Resume

    mode: Resume | None = next((known for known in get_args(Resume) if known == asked), None)
    if mode is None:
        raise UsageError(f"--resume {asked}: choose {', '.join(get_args(Resume))}")
    return mode


def size_option(name: str, text: str | None) -> int | None:
    """Bytes of an option such as 6GB; UsageError for what is no size."""
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as err:
        raise UsageError(f"{name}: {err}") from None


def kv_numerics(choice: str) -> KvNumerics | None:
    """What --kv-cache asks for; UsageError for anything else."""
    if choice not in ("auto", "int4"):
        raise UsageError(f"--kv-cache {choice}: choose auto or int4")
    if choice == "auto":
        return None
    from quantize.model.attention import KvNumerics

    return KvNumerics()


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
