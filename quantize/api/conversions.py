"""`quantize.convert`: recipe and model in, packed checkpoint out."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from quantize.api.choices import (
    CHECK_WINDOWS,
    Assignments,
    assignments_of,
    resume_mode,
    size_option,
)
from quantize.api.html import figure, table
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
from quantize.conversion.estimate import within
from quantize.conversion.loop import convert as run
from quantize.conversion.request import Request
from quantize.conversion.summary import Summary
from quantize.cost.peak import keep_little
from quantize.errors import UsageError
from quantize.files.resume import forget_finished
from quantize.files.transaction import require_apart, require_free, require_name
from quantize.inspect.engines import loads_line
from quantize.parallel.launch import is_launched
from quantize.parallel.ranks import ALONE, Ranks
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import Recipe, load_recipe


@dataclass(frozen=True, kw_only=True)
class Conversion(Summary):
    """What a conversion did; its fields are the keys of `pq convert --json`."""

    loads_in: str
    """Which engines take the output as it is, in one line."""

    def report(self) -> Path:
        """Write OUTPUT.report.html, as `pq report` does; returns its path. OutputError."""
        from quantize.report import write

        return write(Path(self.output))

    def _repr_html_(self) -> str:
        rows = [
            ["recipe", self.recipe],
            ["linears quantized", str(self.quantized_linears)],
            ["bits per weight", figure(self.bits_per_weight, 3)],
            ["size", f"{self.output_bytes / 1e6:.1f} MB (was {self.source_bytes / 1e6:.1f} MB)"],
            ["output error", figure(self.mean_output_error, 5)],
            ["time", f"{self.seconds:.1f} s"],
        ]
        rows += [["not as asked for", line] for line in (*self.adapted, *self.lost)]
        rows += [["not served", line] for line in self.unserved]
        where, _, engines = self.loads_in.partition(": ")
        return table(self.output, [*rows, [where, engines]])


def convert(
    model: str | Path,
    recipe: str | Path | Recipe,
    output: str | Path,
    *,
    revision: str | None = None,
    dataset: str | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    chat_template: bool | None = None,
    text_field: str | None = None,
    bos: str | None = None,
    set: Assignments | None = None,
    target_bpw: float | None = None,
    work: str | Path | None = None,
    resume: str = "auto",
    overwrite: bool = False,
    strict_serving: bool = False,
    check_windows: int = CHECK_WINDOWS,
    max_ram: str | int | None = None,
    max_vram: str | int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Progress = unseen,
    say: Say = silent,
    stop: Callable[[], bool] = lambda: False,
) -> Conversion:
    """Quantize a model; the output appears whole or not at all.

    Arguments are those of `pq convert`, where they are described. model: a folder, or a Hub id
    (`org/name`, `org/name@REVISION`). recipe: a shipped one's name, a YAML file, or a `Recipe`.
    set: stage fields to change, {"bits": 3}. progress: called with what is being done, steps done,
    steps in all. say: called with lines for people (what is fetched). stop: asked after each block;
    StoppedError once it is true, and the same call goes on from there.
    Raises subclasses of `quantize.errors.PqError`; on any error nothing is left at the output.
    """
    if is_launched():
        raise UsageError(
            "quantize.convert works in one process; start it without a launcher, or several of "
            "`pq convert`"
        )
    keep_little()
    request = conversion_request(
        model,
        recipe,
        output,
        revision=revision,
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        chat_template=chat_template,
        text_field=text_field,
        bos=bos,
        set=set,
        target_bpw=target_bpw,
        work=work,
        resume=resume,
        overwrite=overwrite,
        strict_serving=strict_serving,
        check_windows=check_windows,
        max_ram=max_ram,
        max_vram=max_vram,
        device=device,
        dtype=dtype,
        say=say,
    )
    summary = run(request, progress, stop)
    if work is None and request.work is not None:
        shutil.rmtree(request.work, ignore_errors=True)
    return conversion_of(summary)


def conversion_request(
    model: str | Path,
    recipe: str | Path | Recipe,
    output: str | Path,
    *,
    revision: str | None,
    dataset: str | None,
    nsamples: int | None,
    seqlen: int | None,
    seed: int | None,
    chat_template: bool | None,
    text_field: str | None,
    bos: str | None,
    set: Assignments | None,
    target_bpw: float | None,
    work: str | Path | None,
    resume: str,
    overwrite: bool,
    strict_serving: bool,
    check_windows: int,
    max_ram: str | int | None,
    max_vram: str | int | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
    say: Say,
    bars: bool = False,
    loaded: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    local_rank: int | None = None,
) -> Request:
    """What `convert` and `pq convert` run, everything checked that can be before any weight is read.

    loaded: called once torch and transformers are. ranks, local_rank: the processes of a launch,
    and the number of this one on its machine.
    """
    output = Path(output)
    require_name(output)
    mode = resume_mode(resume)
    chosen = chosen_recipe(
        recipe,
        set,
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        chat_template=chat_template,
        text_field=text_field,
        bos=bos,
    )
    kept = Path(work) if work else output.with_name(output.name + ".work")
    if ranks.first:
        forget_finished(kept, output, own=work is None)
        require_free(output, overwrite)
    quiet_libraries()
    loaded()
    place = pick_device(device, local_rank)
    computing = pick_dtype(dtype, place)
    first = ranks.first
    source = local_model(model, revision, say if first else silent, bars and first)
    require_apart(source, output, kept)
    request = Request(
        source,
        chosen,
        output,
        place,
        computing,
        work=kept,
        resume=mode,
        overwrite=overwrite,
        target_bpw=target_bpw,
        strict_serving=strict_serving,
        check_windows=check_windows,
        max_ram=size_option("--max-ram", max_ram),
        max_vram=size_option("--max-vram", max_vram),
        ranks=ranks,
    )
    return within(request)


def chosen_recipe(
    recipe: str | Path | Recipe,
    set: Assignments | None = None,
    *,
    dataset: str | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    chat_template: bool | None = None,
    text_field: str | None = None,
    bos: str | None = None,
) -> Recipe:
    """A recipe with settings of its calibration and fields of its stages changed; RecipeError,
    UsageError."""
    found = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    found = found.with_overrides(dataset, nsamples, seqlen, seed, chat_template, text_field, bos)
    return with_stage_fields(found, assignments_of(set))


def conversion_of(summary: Summary) -> Conversion:
    """A summary with the engines that take the output."""
    loads_in = loads_line(Path(summary.output))
    facts = {f.name: getattr(summary, f.name) for f in dataclasses.fields(summary)}
    return Conversion(**facts, loads_in=loads_in)
