"""`pq serve-check`: which engines take a checkpoint, how to start them, and on which GPUs it fits."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantize.cli import options
from quantize.cli.common import local_model
from quantize.cli.inspect import printable
from quantize.errors import ModelError, PqError, UsageError

if TYPE_CHECKING:
    from quantize.inspect.engines import Loading, Loadings
    from quantize.plan.gpu_counts import Needed, Placed
    from quantize.plan.gpus import Gpu
    from quantize.plan.served import ServedModel

_WIDTH = 80


def serve_check(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="Model folder or Hub id, quantized or not, pq's or another's."
        ),
    ],
    revision: options.Revision = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a sequence; default: 4096, or what config.json allows for."
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    kv_cache: Annotated[
        str,
        typer.Option(
            help="Type of the KV cache: auto (what the checkpoint asks for), bf16, fp8, fp8-head, int8, int4."
        ),
    ] = "auto",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print everything as JSON on stdout."),
    ] = False,
) -> None:
    """Say which engines serve a checkpoint as it is, with what command, memory and GPUs."""
    check = _check(model, local_model(model, revision), context, sequences, kv_cache)
    if as_json:
        typer.echo(json.dumps(check.as_json(), indent=2, ensure_ascii=False))
    else:
        for line in check.lines():
            typer.echo(printable(line))


def serve_commands(model: str, folder: Path) -> dict[str, list[str]]:
    """Engine → lines that start a checkpoint as `pq serve-check` says by default; those of engines
    that serve come first. Empty where it cannot be told."""
    try:
        return _check(model, folder, None, 8, "auto").commands()
    except PqError:
        return {}


def _check(model: str, folder: Path, context: int | None, sequences: int, kv_cache: str) -> _Check:
    from quantize.inspect.engines import loadings
    from quantize.plan.checkpoint import served_model

    found = loadings(folder)
    if found.options and kv_cache != "auto":
        raise UsageError(
            f"--kv-cache {kv_cache}: {model} works on an INT4 cache of its own; leave the option out"
        )
    served, untold = None, None
    try:
        served = served_model(folder, kv_cache, name=model)
    except ModelError as err:
        untold = str(err)
    return _Check(model, folder, found, served, untold, context, sequences, kv_cache)


@dataclasses.dataclass(frozen=True)
class _Check:
    """All that is told of one checkpoint."""

    model: str
    """As it was called."""
    folder: Path
    found: Loadings
    served: ServedModel | None
    untold: str | None
    """Why memory cannot be told."""
    asked_context: int | None
    sequences: int
    kv_cache: str

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        from quantize.inspect.commands import usual_context

        if self.asked_context is not None:
            return self.asked_context
        return usual_context(self.served.max_context if self.served else None)

    def needed(self) -> Needed | None:
        """Bytes of weights and cache."""
        from quantize.plan.gpu_counts import needed

        return None if self.served is None else needed(self.served, self.context, self.sequences)

    def placed(self) -> list[Placed]:
        """By GPU of the table on which vLLM runs it."""
        from quantize.plan.gpu_counts import placed

        if self.served is None or not self._of("vLLM"):
            return []
        return placed(self.served, self.context, self.sequences, self._runs_on)

    def _runs_on(self, gpu: Gpu) -> bool:
        from quantize.formats.engines import runs_on

        return any(runs_on(loading.where, gpu.capability) for loading in self._of("vLLM"))

    def _of(self, engine: str) -> list[Loading]:
        from quantize.inspect.commands import loading_in

        return loading_in(self.found, engine)

    def commands(self) -> dict[str, list[str]]:
        """Engine → lines that start it, those of the shell or of Python."""
        from quantize.inspect.commands import start_commands
        from quantize.plan.kv import KV_TYPES

        kept = next((kind.vllm for kind in KV_TYPES if kind.name == self.kv_cache), None)
        return start_commands(
            self.model,
            self.folder,
            self.found,
            self.context,
            self.sequences,
            None if kept == "auto" else kept,
            min((place.count for place in self.placed() if place.count), default=1),
        )

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        need = self.needed()
        return {
            "model": self.model,
            **dataclasses.asdict(self.found),
            "loads_in": self.found.line,
            "commands": self.commands(),
            "memory": None if need is None else dataclasses.asdict(need),
            "memory_unknown": self.untold,
            "gpus": [
                {
                    "gpu": place.gpu.name,
                    "count": place.count,
                    "sequences": place.found.sequences,
                    "per_gpu": dataclasses.asdict(place.found.memory),
                }
                for place in self.placed()
            ],
            "notes": list(self.served.notes) if self.served else [],
        }

    def lines(self) -> Iterator[str]:
        """The screen."""
        dtype = f", {self.found.dtype}" if self.found.dtype else ""
        yield f"{self.model}: {self.found.architecture}, format {self.found.format}{dtype}"
        yield ""
        yield from self._engine_lines()
        for engine, commands in self.commands().items():
            yield ""
            yield f"{engine}:"
            for command in commands:
                yield f"  {command}"
        yield ""
        yield from self._memory_lines()

    def _engine_lines(self) -> Iterator[str]:
        for one in self.found.distinct:
            about = [*(f"pip install {package}" for package in one.install), *one.notes]
            head = f"{'yes' if one.loads else 'no ':<4}{one.engine:<18}{one.where:<28}"
            first, *rest = textwrap.wrap("; ".join(about), _WIDTH - 6) or [""]
            if len(head) + len(first) <= _WIDTH and not rest:
                yield f"{head}{first}".rstrip()
                continue
            yield head.rstrip()
            yield from (f"      {line}" for line in (first, *rest))

    def _memory_lines(self) -> Iterator[str]:
        need = self.needed()
        if need is None:
            size = sum(path.stat().st_size for path in self.folder.glob("*.gguf"))
            told = f"weights {_gb(size)}; " if size else ""
            yield from textwrap.wrap(f"memory: {told}more cannot be told: {self.untold}", _WIDTH)
            return
        kept = f" ({self.kv_cache})" if self.kv_cache != "auto" else ""
        yield (
            f"memory: {_gb(need.weights)} of weights and {_gb(need.kv)} of KV cache{kept} for "
            f"{need.sequences} × {need.context:,} tokens"
        )
        assert self.served is not None
        for note in self.served.notes:
            yield from textwrap.wrap(note, _WIDTH, initial_indent="  ", subsequent_indent="  ")
        by_count: dict[int | None, list[str]] = {}
        for place in self.placed():
            by_count.setdefault(place.count, []).append(place.gpu.name)
        for count in sorted(by_count, key=lambda n: n or 99):
            yield from _wrapped(count, by_count[count])


def _wrapped(count: int | None, names: Sequence[str]) -> list[str]:
    head = "  not on 8 of " if count is None else f"  fits {count} × "
    return textwrap.wrap(
        head + ", ".join(names),
        _WIDTH,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
