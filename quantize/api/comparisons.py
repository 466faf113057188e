"""`quantize.compare`: several models of one parent side by side, converted first where they are not
there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from quantize.api.choices import (
    Assignments,
    Names,
    bos_choice,
    check_choices,
    kv_numerics,
    names_of,
)
from quantize.api.compared import Comparison
from quantize.api.evaluations import require_windows
from quantize.api.made import Asked, Made, convert_missing
from quantize.api.places import (
    Progress,
    Say,
    local_model,
    pick_device,
    pick_dtype,
    quiet_libraries,
    silent,
    unseen,
)
from quantize.api.speed import tokens_per_second
from quantize.errors import ModelError, UsageError
from quantize.evaluation.protocols import Protocol
from quantize.evaluation.run import Measured, measure
from quantize.files.hub_origin import called
from quantize.files.provenance import read_provenance
from quantize.formats.registry import open_checkpoint
from quantize.inspect.inspection import inspect
from quantize.model.dequantized import open_source
from quantize.model.load_others import rounds_inputs
from quantize.parallel.launch import is_launched
from quantize.report.comparison import Parent, Row


def compare(
    models: Sequence[str | Path] = (),
    baseline: str | Path | None = None,
    *,
    model: str | Path | None = None,
    recipes: Names | None = None,
    into: str | Path | None = None,
    revision: str | None = None,
    calibration: str | None = None,
    nsamples: int | None = None,
    calibration_seqlen: int | None = None,
    set: Assignments | None = None,
    protocol: str | None = None,
    dataset: str | None = None,
    text_field: str | None = None,
    chat_template: bool | None = None,
    seqlen: int = 512,
    context: int = 0,
    max_windows: int | None = None,
    bos: str = "auto",
    numerics: str = "kernel",
    kv_cache: str = "auto",
    speed: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    output: str | Path | None = None,
    progress: Progress = unseen,
    say: Say = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Measure models of one parent on the same windows, the parent run once.

    Arguments are those of `pq compare`, where they are described. models: folders or Hub ids, pq's
    or other tools'. baseline: the parent. model, recipes: instead of the baseline, a parent that is
    converted with each of these recipes whose conversion is not in the folder `into` yet.
    progress: called with what is being done, steps done, steps in all. say: called with lines for
    people. stop: asked after each block of a conversion; StoppedError once it is true, and the same
    call goes on from there.
    A recipe that cannot be carried out is left out, and stands in `errors` of the result.
    Raises subclasses of `quantize.errors.PqError`.
    """
    if is_launched():
        raise UsageError("compare works in one process; start it without a launcher")
    asked = names_of(recipes)
    _require_one_parent(models, baseline, model, asked, into, revision)
    check_choices(protocol, numerics)
    require_windows(seqlen, context, max_windows)
    begins = bos_choice(bos)
    attention = kv_numerics(kv_cache)
    page = None if output is None else _page(Path(output))
    quiet_libraries()
    place = pick_device(device)
    computing = pick_dtype(dtype, place)
    folders = [local_model(each, None, say) for each in models]
    made = Made()
    if model is not None:
        parent = local_model(model, revision, say)
        target = Path(into) if into else Path(f"compare-{called(parent).replace('/', '--')}")
        how = Asked(calibration, nsamples, calibration_seqlen, set, place, "auto")
        made = convert_missing(parent, asked, target, how, progress, say, stop)
        if not made.folders and not folders:
            raise next(iter(made.errors.values()))
    else:
        assert baseline is not None
        parent = local_model(baseline, None, say)
    folders = [*made.folders.values(), *folders]
    measured = measure(
        folders,
        parent,
        Protocol("rolling" if protocol == "rolling" else "strided", seqlen, context),
        dataset=dataset or "builtin",
        text_field=text_field,
        chat_template=chat_template,
        max_windows=max_windows,
        bos=begins,
        device=place,
        dtype=computing,
        attention=attention,
        numerics="stock" if numerics == "stock" else "kernel",
        progress=progress,
    )
    speeds, notes = _speeds([parent, *folders], place, progress) if speed else ({}, [])
    rows = [
        _row(name, folder, found, speeds.get(folder))
        for name, folder, found in zip(_names(folders), folders, measured, strict=True)
    ]
    notes += [
        f"{name}: read as a 16-bit model; the rounding of activations that its config.json asks for "
        "is not measured"
        for name, folder in zip(_names(folders), folders, strict=True)
        if open_source(folder).dequantized and rounds_inputs(open_checkpoint(folder))
    ]
    told = Parent(called(parent), _bytes(parent), speeds.get(parent))
    found = Comparison(told, tuple(rows), made.errors, tuple(notes))
    if page:
        found.write(page)
    return found


def _require_one_parent(
    models: Sequence[str | Path],
    baseline: str | Path | None,
    model: str | Path | None,
    recipes: Sequence[str],
    into: str | Path | None,
    revision: str | None,
) -> None:
    if model is not None and baseline is not None:
        raise UsageError("--model and --baseline both name the parent; give one of them")
    if recipes and model is None:
        raise UsageError("--recipes: name the model to convert with --model")
    if model is not None and not recipes:
        raise UsageError("--model: name what to convert it with, --recipes a,b,c")
    if model is None and (into is not None or revision is not None):
        raise UsageError("--into and --revision belong to --model and --recipes")
    if model is None and baseline is None:
        raise UsageError("name the parent with --baseline, or with --model and --recipes")
    if not models and not recipes:
        raise UsageError("name the folders to compare, or --model and --recipes")


def _page(output: Path) -> Path:
    """A page that can be written, told before anything is computed."""
    if output.suffix not in (".html", ".htm"):
        raise UsageError(f"--output {output}: must end in .html; the JSON goes beside it")
    return output


def _names(folders: Sequence[Path]) -> list[str]:
    """How models are told apart: by what they are called, or by path where two are called alike."""
    names = [called(folder) for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def _bytes(folder: Path) -> int:
    return sum((folder / shard).stat().st_size for shard in open_checkpoint(folder).shards)


def _row(name: str, folder: Path, measured: Measured, speed: float | None) -> Row:
    found = measured.figures
    bits = found.bits_per_weight
    if bits is None:  # what others store small is read as a 16-bit model
        bits = inspect(folder).totals.quantized_bits_per_weight
    made = read_provenance(folder)
    recipe = str(made["recipe"]["name"]) if made else None
    return Row(name, found, bits, _bytes(folder), recipe, speed)


def _speeds(
    folders: Sequence[Path], device: torch.device, progress: Progress
) -> tuple[dict[Path, float], list[str]]:
    """Tokens a second of each that was measured, and what is to be said of the others."""
    dtype = pick_dtype("auto", device)
    found, notes = {}, []
    for done, folder in enumerate(folders):
        progress("measuring speed", done, len(folders))
        try:
            speed = tokens_per_second(folder, device, dtype)
        except ModelError as err:
            notes.append(f"speed not measured: {err}")
            continue
        if speed is None:
            notes.append(f"{called(folder)}: speed not measured, transformers does not load it")
        else:
            found[folder] = speed
    kind = str(dtype).removeprefix("torch.")
    notes.append(f"tokens/s: one sequence in transformers, {device.type}, {kind}")
    return found, notes
