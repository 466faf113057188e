"""`pq draft`: whether checkpoints are good draft models of a parent, and how far they should look
ahead."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantize.cli import options
from quantize.cli.common import local_model, pick_device, pick_dtype, quiet_libraries
from quantize.cli.progress import Progress, progress_bar
from quantize.cli.told import warnings_told
from quantize.errors import UsageError
from quantize.version import __version__

if TYPE_CHECKING:
    import torch

    from quantize.draft.analysis import Analysis


def draft(
    drafts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DRAFT...]", help="Draft models: folders or Hub ids org/name."),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", "-t", help="The parent: a folder or org/name@REVISION.")
    ] = "",
    sibling: Annotated[
        list[str] | None,
        typer.Option(help="A smaller model of the same tokenizer; may be given more than once."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe", "-r", help="A self-copy: convert the parent so first; more than once."
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Prompts: builtin, a file, or a Hub set; each is a domain."),
    ] = None,
    text_field: options.TextField = None,
    chat_template: options.ChatTemplate = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each data set.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a prompt of text.")] = 64,
    tokens: Annotated[
        int, typer.Option(min=2, help="Most tokens that the parent writes after each.")
    ] = 128,
    temperature: Annotated[
        list[float] | None,
        typer.Option(min=0.0, help="0 is greedy; may be given more than once. Default: 0 and 1."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what the parent draws.")] = 0,
    rollout: Annotated[
        Path | None, typer.Option(help="Texts of the parent from --save-rollout, not new ones.")
    ] = None,
    save_rollout: Annotated[
        Path | None, typer.Option(help="Keep the parent's texts in this file.")
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="GPU whose times and memory are reckoned with.")
    ] = "h100",
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share both models.")] = 1,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens that a sequence holds, for times and memory.")
    ] = 2048,
    cost: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="A cost ratio you measured (draft step / parent step), not --gpu."
        ),
    ] = None,
    policies: Annotated[
        bool, typer.Option("--policies", help="Replay policies of lengths (DSDE, AdaEDL, ...).")
    ] = False,
    kv_int4: Annotated[
        bool, typer.Option("--kv-int4", help="Also run the parent itself on an INT4 cache.")
    ] = False,
    save_policy: Annotated[
        Path | None,
        typer.Option(
            help="Write the fitted policy of the first draft, where it wins (--policies)."
        ),
    ] = None,
    bos: options.BosOption = "auto",
    numerics: options.NumericsOption = "kernel",
    kv_cache: options.KvCache = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Page with tables and pictures, FILE.html."),
    ] = None,
    emit: Annotated[
        Path | None, typer.Option(help="Write vLLM's --speculative-config of the first draft.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure draft models for speculative decoding, and what they pay.

    The parent writes once after each prompt; each draft reads that text once. Acceptance, tokens per
    step at each length and policies follow by replay.
    """
    options.check_choices(None, numerics)
    if not target:
        raise UsageError("name the parent with --target")
    if save_policy is not None and not policies:
        raise UsageError("--save-policy needs --policies, which fits one")
    if numerics not in ("kernel", "stock"):
        raise UsageError(f"--numerics {numerics}: choose kernel or stock")
    from quantize.draft.analysis import analyse
    from quantize.draft.pays import Place
    from quantize.draft.rollout import read_rollouts, save_rollouts
    from quantize.draft.run import CACHE, Settings, measure
    from quantize.plan.gpus import gpu_named

    quiet_libraries()
    place = None if cost is not None else Place(gpu_named(gpu), tp, context)
    where = pick_device(device)
    computing = pick_dtype(dtype, where)
    parent = local_model(target)
    named = [local_model(name) for name in (*(drafts or ()), *(sibling or ()))]
    if not named and not recipe and not kv_int4:
        raise UsageError("give a draft model, --recipe or --sibling")
    settings = Settings(
        tuple(dataset or ("builtin",)),
        prompts,
        prompt_tokens,
        tokens,
        tuple(temperature or (0.0, 1.0)),
        seed=seed,
        bos=options.bos_choice(bos),
        text_field=text_field,
        chat_template=chat_template,
        device=where,
        dtype=computing,
        numerics="stock" if numerics == "stock" else "kernel",
        attention=options.kv_numerics(kv_cache),
        kv_int4=kv_int4,
    )
    saved = None if rollout is None else read_rollouts(rollout)
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar())
        stack.enter_context(warnings_told())
        copies = [
            stack.enter_context(_copy(parent, name, where, computing, progress))
            for name in recipe or ()
        ]
        found = measure(parent, [*named, *copies], settings, saved=saved, progress=progress)
        cache = next((n for n, d in enumerate(found.drafts) if d.name == CACHE), None)
        analysis = analyse(
            found,
            parent,
            place=place,
            cost=cost,
            policies=policies,
            cache=cache,
            paths={copy.name: f"{parent}-{copy.name}" for copy in copies},
            progress=progress,
        )
    for copy, name in zip(copies, recipe or (), strict=True):
        typer.echo(
            f"pq: note: {copy.name} was converted for this run alone; to serve it: pq convert -m "
            f"{target} -r {name} -o {parent}-{copy.name}",
            err=True,
        )
    if save_rollout is not None:
        save_rollouts(found.rollouts, found.parent, save_rollout)
    if as_json:
        from quantize.draft.analysis import as_json as data_of

        typer.echo(json.dumps(data_of(analysis), indent=2))
    else:
        from quantize.cli.draft_tables import print_analysis

        print_analysis(analysis)
    # last: that there is nothing to emit must not cost anyone the figures that say why
    _write(analysis, output, emit, save_policy)


def _write(
    analysis: Analysis, output: Path | None, emit: Path | None, save_policy: Path | None
) -> None:
    """Write the files that were asked for; UsageError where there is nothing to write."""
    from quantize.files.disk import write_text

    if output is not None:
        from quantize.report import write_page
        from quantize.report.draft import draft_page

        write_page(draft_page(analysis, __version__), output)
        typer.echo(f"{output} written", err=True)
    first = analysis.drafts[0]
    if emit is not None:
        if first.config is None:
            raise UsageError(
                f"--emit {emit}: {first.figures.name} is not faster than the parent alone at any "
                "length here; try another GPU, --cost or draft"
            )
        write_text(emit, json.dumps(first.config, indent=1) + "\n")
        typer.echo(f"{emit} written; {first.command}", err=True)
        for note in first.notes:
            typer.echo(f"pq: note: {note}", err=True)
    if save_policy is not None:
        fits = [entry.fit for entry in first.by_temperature if entry.fit is not None]
        winner: Any = next((fit for fit in fits if fit.wins), None)
        if winner is None:
            typer.echo(
                f"pq: {save_policy} not written: no fitted policy beat its static length beyond the "
                "error on prompts that it was not fitted on",
                err=True,
            )
        else:
            write_text(save_policy, winner.policy.to_json())
            typer.echo(f"{save_policy} written", err=True)


@contextmanager
def _copy(
    parent: Path,
    recipe: str,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> Iterator[Path]:
    """The parent converted by a recipe, in a folder called after it that goes with the run."""
    from quantize.conversion.loop import convert
    from quantize.conversion.request import Request
    from quantize.recipe.recipe import load_recipe

    loaded = load_recipe(recipe)
    with tempfile.TemporaryDirectory(prefix="pq-draft-") as folder:
        into = Path(folder) / Path(recipe).name.removesuffix(".yaml")
        convert(Request(parent, loaded, into, device, dtype), progress)
        yield into
