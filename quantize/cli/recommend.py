"""`pq recommend`: which recipe for a model on a GPU, what it costs, and the commands to type."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantize.cli import complete, options
from quantize.cli.common import loading, local_model, quiet_libraries
from quantize.cli.inspect import printable
from quantize.cli.options import size_option
from quantize.errors import PlanError, PqError, UsageError

if TYPE_CHECKING:
    from quantize.conversion.estimate import Estimate
    from quantize.recommend.choose import Recommendation
    from quantize.recommend.ways import Asked, Way

_WIDTH = 80


def recommend(
    model: options.Model,
    revision: options.Revision = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Where it is to run: h100, a100, l4, 4090, … (those of pq plan), cpu or mac; "
            "default: a line for each.",
            autocompletion=complete.targets,
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, max=8, help="GPUs that there are, at most.")] = 8,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of a cpu or a mac, e.g. 16GB; default of cpu: this machine's."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens of a sequence; default: 4096, or what config.json allows for."
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the commands; default: MODEL-RECIPE."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say which recipe fits and pays where a model is to run; exit code 10 where none fits.

    Sizes and times are told before anything is converted; losses are what we measured on other models.
    """
    with loading("loading torch and transformers"):
        from quantize.recommend.choose import as_json as plain
        from quantize.recommend.choose import recommend as choose
        from quantize.recommend.target import all_targets, target_named
        from quantize.recommend.ways import asked_for, host_memory, outputs_of

    size = size_option("--memory", memory)
    if memory is not None and gpu is None:
        raise UsageError("--memory goes with --gpu cpu or mac")
    if gpu is not None and gpu.lower() == "cpu" and size is None:
        size = host_memory()
    targets = all_targets(gpus) if gpu is None else [target_named(gpu, gpus, size)]
    quiet_libraries()
    asked = asked_for(model, local_model(model, revision), context, sequences)
    names = tuple(dict.fromkeys(name for target in targets for name in target.recipes))
    outputs = outputs_of(asked, names)
    found = [choose(asked, target, outputs) for target in targets]
    if gpu is None:
        if as_json:
            facts = _asked_json(asked) | {"targets": [plain(one) for one in found]}
            typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        else:
            _say(_overview(found))
        return
    (one,) = found
    steps = None if one.chosen is None else _Steps(asked, one.chosen, output)
    if as_json:
        facts = _asked_json(asked) | plain(one)
        facts |= {"commands": None, "estimate": None} if steps is None else steps.as_json()
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _say(_lines(one, steps))
    if one.chosen is None:
        raise PlanError(f"no recipe: {_called(model)} fits no {_place(one)} as asked")


def _say(lines: Iterator[str]) -> None:
    for line in lines:
        typer.echo(printable(line))


def _asked_json(asked: Asked) -> dict[str, Any]:
    return {"model": asked.model, "context": asked.context, "sequences": asked.sequences}


class _Steps:
    """What to type for a way, and what its conversion takes on this machine."""

    def __init__(self, asked: Asked, way: Way, output: Path | None) -> None:
        self.asked, self.way = asked, way
        base = _called(asked.model)
        self.output = str(output or f"{base}-{way.output.name}")
        self.estimate: Estimate | None = None
        self.problem: str | None = None
        try:
            self.estimate = _estimate(asked, way)
        except PqError as err:
            self.problem = str(err).splitlines()[0]

    def convert(self) -> str:
        """The command that makes the output."""
        words = ["pq", "convert", "--model", self.asked.model, "--recipe", self.way.output.name]
        return shlex.join([*words, "--output", self.output])

    def measure(self) -> str:
        """The command that tells what this model loses."""
        return shlex.join(["pq", "eval", self.output, "--baseline", self.asked.model])

    def serve(self) -> list[str]:
        """Lines that install what is missing, and start the engine that was chosen."""
        from quantize.inspect.commands import start_commands

        found, runner = self.way.output.found, self.way.runner
        assert found is not None
        assert runner.engine is not None
        commands = start_commands(
            self.output,
            Path(self.output),
            found,
            self.asked.context,
            self.asked.sequences,
            None,
            self.way.count or 1,
        )
        lines = [f"pip install {package}" for package in runner.install]
        for engine, started in commands.items():
            if runner.engine.startswith(engine):
                return lines + started
        file = shlex.quote(str(Path(self.output) / "model.gguf"))  # not there yet
        total = self.asked.context * self.asked.sequences
        return [*lines, f"llama-server -m {file} -c {total} -np {self.asked.sequences}"]

    def as_json(self) -> dict[str, Any]:
        """Commands, and what the conversion takes."""
        return {
            "commands": {
                "convert": self.convert(),
                "serve": self.serve(),
                "measure": self.measure(),
            },
            "estimate": None if self.estimate is None else self.estimate.as_json(),
            "estimate_problem": self.problem,
        }


def _estimate(asked: Asked, way: Way) -> Estimate:
    """Memory and disk of the conversion on a CPU; PqError for what `pq convert` would refuse."""
    import torch

    from quantize.conversion.estimate import estimate
    from quantize.conversion.request import Request

    assert way.output.recipe is not None
    cpu = torch.device("cpu")
    return estimate(
        Request(asked.folder, way.output.recipe, Path("out"), cpu, torch.float32), timed=False
    )


def _called(model: str) -> str:
    return Path(model.partition("@")[0].rstrip("/")).name or "model"


def _place(found: Recommendation) -> str:
    target = found.target
    return f"{target.most} × {target.name}" if target.gpu else target.name


def _lines(found: Recommendation, steps: _Steps | None) -> Iterator[str]:
    """The screen of one target."""
    asked = found.asked
    yield f"{asked.model} on {found.target.name}: {_work(asked)}"
    yield ""
    yield from _table(found)
    yield ""
    for one in (found.plain, *found.ways):
        if one.count is None:
            yield from _wrapped(f"{one.output.name} does not: {one.why_not}")
    if steps is None:
        return
    yield from _wrapped(_reason(found))
    yield from _wrapped(_loss(steps.way))
    yield ""
    for head, lines in (
        ("convert", [steps.convert()]),
        ("serve", steps.serve()),
        ("measure what yours loses", [steps.measure()]),
    ):
        yield f"{head}:"
        yield from (f"  {line}" for line in lines)
    yield ""
    yield from _wrapped(_cost(steps))


def _work(asked: Asked) -> str:
    plural = "s" if asked.sequences > 1 else ""
    return f"{asked.sequences} sequence{plural} of {asked.context:,} tokens at once"


_HEADS = ("recipe", "weights", "KV cache", "GPUs", "1st token", "each token", "KLD", "engine")


def _table(found: Recommendation) -> Iterator[str]:
    """A line for each way."""
    rows = [_HEADS, *(_cells(one) for one in (found.plain, *found.ways))]
    on_gpus = found.target.gpu is not None
    kept = [i for i in range(len(_HEADS)) if on_gpus or i not in (3, 4, 5)]
    widths = [max(len(row[i]) for row in rows) for i in kept]
    for row in rows:
        cells = [
            row[i].ljust(width) if i in (0, 7) else row[i].rjust(width)
            for i, width in zip(kept, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def _cells(one: Way) -> tuple[str, ...]:
    name, kld = one.output.name, "-" if one.kld is None else f"{one.kld:.4f}"
    if not one.weights:
        return (name, "-", "-", "-", "-", "-", kld, "-")
    engine = "-" if one.runner.engine is None else one.runner.engine.partition(" ")[0]
    engine += "".join(f" + {package}" for package in one.runner.install)
    times = ("-", "-")
    if one.count is not None and one.first is not None and one.each is not None:
        times = (_time(one.first), _time(one.each))
    count = "-" if one.count is None else str(one.count)
    return (name, _gb(one.weights), _gb(one.cache), count, *times, kld, engine)


def _reason(found: Recommendation) -> str:
    """Why this one."""
    way, plain = found.chosen, found.plain
    assert way is not None
    recipe = way.output.recipe
    assert recipe is not None
    settings = "".join(f" --set {setting}" for setting in way.output.settings)
    stands = f" ({recipe.name}{settings})" if recipe.name != way.output.name else ""
    parts = []
    if found.target.gpu is not None:
        there = " where the model as it is does not fit"
        if plain.count == way.count:
            there = ", as without it"
        elif plain.count is not None:
            there = f" where the model as it is takes {plain.count}"
        parts.append(f"{way.count} × {found.target.name}{there}")
    if plain.weights:
        parts.append(f"weights {plain.weights / way.weights:.1f} times smaller")
    if plain.each and way.each and plain.count == way.count:
        parts.append(f"{_time(way.each)} a token instead of {_time(plain.each)}")
    return f"take {way.output.name}{stands}: {', '.join(parts)}"


def _loss(way: Way) -> str:
    """What it costs in accuracy, and where that was measured."""
    from quantize.recipe.measured import ABOUT

    losses = list(way.output.losses.values())
    if not losses:
        return f"what {way.output.name} loses we have not measured in eval/results; measure yours"
    figures = " and ".join(f"{one.kld:.4f} on {one.model}" for one in losses)
    return (
        f"it loses KLD {figures}: our measurements, {losses[0].file}, of {ABOUT}, not of your model"
    )


def _cost(steps: _Steps) -> str:
    from quantize.cost.units import gigabytes
    from quantize.plan.latency import ERRORS

    if steps.estimate is None:
        return f"pq convert would refuse it as it stands: {steps.problem}"
    found = steps.estimate
    text = (
        f"converting takes at most {gigabytes(found.ram)} of memory and {gigabytes(found.disk)} of disk "
        "on a CPU (pq estimate tells how long)"
    )
    if steps.way.option is None:
        return text
    first, each = ERRORS["ttft"], ERRORS["tpot"]
    return (
        f"{text}; times are those of pq plan's model: four of five measured ones fell within "
        f"{first.low - 1:+.0%} to {first.high - 1:+.0%} of the first token's and {each.low - 1:+.0%} to "
        f"{each.high - 1:+.0%} of each token's"
    )


def _overview(found: Sequence[Recommendation]) -> Iterator[str]:
    """A line for each target."""
    from quantize.recipe.measured import ABOUT

    asked = found[0].asked
    yield f"{asked.model}: {_work(asked)}"
    yield ""
    rows = [("on", "as it is", "recipe", "GPUs", "each token", "KLD", "engine")]
    for one in found:
        plain = "no" if one.plain.count is None else str(one.plain.count)
        name = one.target.name
        if one.target.gpu is None:
            plain = "-"
        if one.chosen is None:
            rows.append((name, plain, "none fits", "-", "-", "-", "-"))
            continue
        recipe, _, _, count, _, each, kld, engine = _cells(one.chosen)
        rows.append((name, plain, recipe, count if one.target.gpu else "-", each, kld, engine))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if i in (1, 3, 4, 5) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
    yield ""
    yield from _wrapped(
        f"KLD: the worse of what we measured of {ABOUT}. --gpu NAME shows all recipes there, and the commands"
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.9995 else f"{1e3 * seconds:.1f} ms"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
