"""The conversion loop: one decoder block at a time is loaded, measured,
transformed, written and freed."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantize.block.statistics import STATISTICS
from quantize.block.walk import Streams
from quantize.calibration.text_sources import name_of
from quantize.calibration.tokens import TokenSet
from quantize.conversion.beside import part_sizes, tensors_beside
from quantize.conversion.card import CARD, Made, card
from quantize.conversion.conversion import Conversion
from quantize.conversion.decide import decide
from quantize.conversion.draft import draft
from quantize.conversion.held_out import look_at
from quantize.conversion.inside import Inside
from quantize.conversion.joint import NoWriter, require_same_block, shared_state
from quantize.conversion.output import facts_of, output_config
from quantize.conversion.pace import Pace
from quantize.conversion.plan import Plan
from quantize.conversion.request import Progress, Request
from quantize.conversion.snapshot import pack_run, state_layout, unpack_run
from quantize.conversion.source import has_tail
from quantize.conversion.summary import Summary, results_of, summary_of
from quantize.errors import StoppedError
from quantize.files.hub_origin import hub_origin
from quantize.files.provenance import DIGEST, PROVENANCE, provenance_digest
from quantize.files.resume import StateFolder
from quantize.files.transaction import require_apart, require_free
from quantize.files.writer import CheckpointWriter
from quantize.formats.registry import FORMATS
from quantize.methods.plugins import method_versions
from quantize.parallel.agreement import processor, require_equal
from quantize.recipe.recipe import Recipe, resolved_yaml
from quantize.version import __version__

__all__ = ["Request", "Summary", "convert"]

_VERSIONED = ("torch", "transformers", "compressed-tensors", "safetensors")


def convert(
    request: Request,
    progress: Progress = lambda what, done, total: None,
    stop: Callable[[], bool] = lambda: False,
    inside: Inside = lambda what, share: None,
) -> Summary:
    """Run a recipe over a checkpoint and write the packed result to `request.output`.

    Peak memory holds one decoder block (two where a stage aims at the parent's outputs), its
    Hessians, the embedding matrix and the calibration activations; never the whole model. Equal
    inputs, seed and versions give equal bytes, taken up or not, with any number of ranks, of which
    the first alone writes. stop: asked after each block where `request.resume` keeps blocks;
    StoppedError on all ranks once it is true on one.
    inside: told the stages and linears of the block under way.
    Raises PqError subclasses; on any error nothing is left at the output.
    """
    started, ranks = time.monotonic(), request.ranks
    if ranks.first:
        require_free(request.output, request.overwrite)
        require_apart(request.model, request.output, request.work)
    with (
        ranks.explain(),
        StateFolder(request.work, request.resume if ranks.first else None) as state,
    ):
        plan, space, tokens = draft(request)
        blocks = plan.shape.n_blocks
        progress("hashing source", 0, blocks)
        require_equal(ranks, _surroundings(plan, tokens))
        hashes = plan.source.hashes() if ranks.first else {}
        keeper = _Keeper(state, request, _fingerprint(plan, hashes, tokens), blocks, stop)
        kept = shared_state(ranks, state.take_up(keeper.fingerprint))
        if not kept and ranks.first:  # now, since what later blocks find would end a run of hours
            progress("checking source", 0, blocks)
            plan.source.require_finite(plan.arch.is_beside)
        streams: Streams[str] | None = None
        look: dict[str, Any] | None = None
        done, written = (kept.blocks, kept.written) if kept else (0, {})
        if kept:
            run, streams = unpack_run(plan, kept.facts, kept.tensors)
        else:
            run = Conversion(decide(plan, space, tokens, progress))
            if plan.needs_decisions or space:
                keeper.keep(run, 0, None, {})
        run.inside = inside
        if not done:
            streams = run.embed(tokens)
        parts = blocks + 1 + has_tail(plan) + len(part_sizes(plan))
        with _writer(request, parts, state.partial, written) as writer:
            weights = [plan.skeleton.linear_shapes(index).values() for index in range(blocks)]
            pace = Pace(request, done, [sum(N * K for N, K in shapes) for shapes in weights])
            _write_blocks(run, streams, pace, writer, keeper, progress)
            ranks.release()
            progress("writing", blocks, blocks)
            if isinstance(writer, CheckpointWriter):
                look = _finish(run, streams, writer, hashes, tokens, progress)
        state.clear()
    seconds = time.monotonic() - started
    return summary_of(run.plan, run.state, tokens, seconds, pace.per_block, writer.total_size, look)


@dataclass(frozen=True)
class _Keeper:
    """Keeps what is done, and stops where that is asked for."""

    state: StateFolder
    request: Request
    fingerprint: dict[str, Any]
    blocks: int
    stop: Callable[[], bool]

    def keep(
        self, run: Conversion, done: int, streams: Streams[str] | None, written: dict[str, Any]
    ) -> None:
        """Commit the state after `done` blocks. StoppedError when it is time to stop."""
        if self.request.work is None or self.request.resume in (None, "never"):
            return
        if self.state.keeps:
            self.state.commit(self.fingerprint, done, *pack_run(run, streams), written)
        if self.request.ranks.any(self.stop()):
            what = f"block {done} of {self.blocks}" if done else "planning"
            raise StoppedError(f"stopped after {what}; the same command goes on from there")


def _write_blocks(
    run: Conversion,
    streams: Streams[str] | None,
    pace: Pace,
    writer: CheckpointWriter | NoWriter,
    keeper: _Keeper,
    progress: Progress,
) -> None:
    """Convert and write all blocks that are not done."""
    plan = run.plan
    if not pace.done:
        run.state.source_bytes += sum(part_sizes(plan))
    written = plan.source.output.written
    if not pace.done and plan.request.ranks.first:
        writer.add(written(run.tensors_outside(*plan.arch.before)))
        for copied in tensors_beside(plan):
            writer.add(copied)
    for index in range(pace.done, keeper.blocks):
        progress("quantizing", index, keeper.blocks)
        tensors = run.block(index, streams)
        require_same_block(plan.request.ranks, index, tensors)
        writer.add(written(tensors))
        if streams and index + 1 == keeper.blocks:
            streams.clear()
        pace.finish()
        keeper.keep(run, index + 1, streams, writer.progress)


def _finish(
    run: Conversion,
    streams: Streams[str] | None,
    writer: CheckpointWriter,
    hashes: Mapping[str, str],
    tokens: TokenSet | None,
    progress: Progress,
) -> dict[str, Any] | None:
    """Write what stands behind the blocks, look at it and let the output appear; returns what the
    look found.

    hashes: of the source's files. tokens: what was calibrated on.
    """
    plan, state = run.plan, run.state
    if has_tail(plan):
        writer.add(plan.source.output.written(run.tensors_outside(*plan.arch.after)))
    beside = plan.format.side_files(plan.source.side_files())
    for path in beside:
        name = path.relative_to(plan.source.folder).as_posix()
        if name != CARD:
            writer.copy(path, name)
    config = output_config(plan, state)
    writer.finish(config, facts_of(plan, config))
    writer.write_json("config.json", config)
    plan.request.require_room()
    look = look_at(plan, tokens, writer.folder, progress)
    parents = next((path for path in beside if path == plan.source.folder / CARD), None)
    base = _provenance(plan, hashes, tokens)
    text = card(plan, Made(state, writer.folder, base, look), parents)
    writer.write(CARD, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
    writer.write_json(STATISTICS, state.statistics.as_json())
    plan.request.require_room()
    results = results_of(plan, state, streams.dropped if streams else 0)
    told = {"held_out": look} if look else {}
    facts = base | results | told | {"files": writer.hashes}
    writer.write_json(PROVENANCE, facts | {DIGEST: provenance_digest(facts)})
    writer.commit()
    return look


def _writer(
    request: Request, parts: int, kept: Path | None, written: Mapping[str, Any]
) -> CheckpointWriter | NoWriter:
    if not request.ranks.first:
        return NoWriter()
    encoding = FORMATS[request.recipe.format].encoding(parts)
    return CheckpointWriter(request.output, encoding, kept, written, request.overwrite)


def _surroundings(plan: Plan, tokens: TokenSet | None) -> dict[str, Any]:
    """What must be alike for all ranks to compute the same, by name."""
    source = plan.source
    names = ("config.json", *source.shards)
    sizes = {name: (source.folder / name).stat().st_size for name in names}
    numerics = {"processor": processor(plan.request.device), "threads": torch.get_num_threads()}
    where = {"sizes of the source": sizes, "origin": _origin(plan)}
    return numerics | where | _fingerprint(plan, {}, tokens)


def _fingerprint(plan: Plan, hashes: Mapping[str, str], tokens: TokenSet | None) -> dict[str, Any]:
    """All that decides what is written, and how it is kept, by name.

    A state of another fingerprint is not gone on from.
    """
    request, facts = plan.request, _provenance(plan, hashes, tokens)
    recipe = without_folder(request.recipe).model_dump(mode="json")
    told = {"recipe": recipe, "target_bpw": request.target_bpw}
    # Not the name of the source: its hashes say what it is, wherever it came from.
    told |= {key: facts[key] for key in facts if key not in ("recipe", "origin")}
    if tokens is not None:  # nor the text's: its hash says what it is
        told["calibration"] = {k: v for k, v in facts["calibration"].items() if k != "commit"}
    return told | {"batch_tokens": request.batch_tokens, "kept": state_layout()}


def without_folder(recipe: Recipe) -> Recipe:
    """The recipe without the folder of its text: equal texts give equal bytes,
    and are known by their hash."""
    return recipe.with_overrides(dataset=name_of(recipe.calibration.dataset))


def _origin(plan: Plan) -> dict[str, str] | None:
    """Id and commit of a parent from the Hub."""
    found = hub_origin(plan.request.model)
    return None if found is None else found.as_json()


def _provenance(plan: Plan, hashes: Mapping[str, str], tokens: TokenSet | None) -> dict[str, Any]:
    request, recipe = plan.request, plan.recipe
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    versions |= method_versions(recipe.stages)
    return {
        "pq": __version__,
        "versions": {"python": platform.python_version(), **versions},
        "machine": {
            "device": request.device.type,
            "dtype": str(request.dtype).removeprefix("torch."),
        },
        "recipe": {"name": recipe.name, "resolved": resolved_yaml(without_folder(recipe))},
        "origin": _origin(plan),
        "source": dict(hashes),
        "dequantized": asdict(plan.source.dequantized) if plan.source.dequantized else None,
        "calibration": None if tokens is None else {**tokens.origin, "sha256": tokens.sha256},
    }
