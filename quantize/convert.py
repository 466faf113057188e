"""The conversion loop: one decoder block at a time is loaded, measured, transformed, written and freed."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import quantize
from quantize.allocation import Space
from quantize.arch import Architecture, Shape, architecture_of
from quantize.basis import Basis
from quantize.calib import TokenSet, calibration_tokens, check_vocab
from quantize.checkpoint import Checkpoint
from quantize.conversion import HEAD_GROUP, Conversion, Progress, Request, Summary
from quantize.errors import ModelError, RecipeError, StoppedError, UsageError
from quantize.joint import (
    NoWriter,
    processor,
    require_equal,
    require_same_block,
    shared_state,
    shared_tokens,
)
from quantize.load import require_tied
from quantize.provenance import DIGEST, PROVENANCE, provenance_digest
from quantize.recipe import Recipe, format_problems, resolved_yaml
from quantize.resume import StateFolder
from quantize.skeleton import Skeleton, load_tokenizer
from quantize.snapshot import restored, snapshot
from quantize.statistics import STATISTICS
from quantize.streams import Streams
from quantize.writer import CheckpointWriter, require_apart, require_free

__all__ = ["Request", "Summary", "convert"]

_VERSIONED = ("torch", "transformers", "compressed-tensors", "safetensors")


def convert(
    request: Request,
    progress: Progress = lambda what, done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Run a recipe over a checkpoint and write the packed result to `request.output`.

    Peak memory holds one decoder block (two where a stage aims at the parent's outputs), its Hessians, the embedding
    matrix and the calibration activations; never the whole model. Equal inputs, seed and versions give equal bytes,
    taken up or not, with any number of ranks, of which the first alone writes. stop: asked after each block where
    `request.resume` keeps blocks; StoppedError on all ranks once it is true on one.
    Raises PqError subclasses; on any error nothing is left at the output.
    """
    started, ranks = time.monotonic(), request.ranks
    if ranks.first:
        require_free(request.output)
        require_apart(request.model, request.output, request.work)
    with ranks.explained(), StateFolder(request.work, request.resume if ranks.first else None) as state:
        run, space, tokens = _opened(request)
        blocks = run.shape.n_blocks
        progress("hashing source", 0, blocks)
        require_equal(ranks, _surroundings(request, run.source, tokens))
        hashes = run.source.hashes() if ranks.first else {}
        keeper = _Keeper(state, request, _fingerprint(request, hashes, tokens), blocks, stop)
        kept = shared_state(ranks, state.take_up(keeper.fingerprint))
        if not kept and ranks.first:  # now, since what later blocks find would end a run of hours
            progress("checking source", 0, blocks)
            run.source.require_finite()
        streams: Streams | None = None
        done, written = (kept.blocks, kept.written) if kept else (0, {})
        if kept:
            run, streams = restored(run, kept.facts, kept.tensors)
        elif run.needs_plan or space:
            run = _settled(run, space, tokens, progress)
            keeper.keep(run, 0, None, {})
        if not done:
            streams = run.embed(tokens)
        with _writer(request, blocks + 2, state.partial, written) as writer:
            streams = _write_blocks(run, streams, done, writer, keeper, progress)
            ranks.release()
            progress("writing", blocks, blocks)
            if isinstance(writer, CheckpointWriter):
                _finish(run, streams, writer, _provenance(run.request, hashes, tokens))
        state.clear()
    return run.summary(time.monotonic() - started, writer.total_size)


@dataclass(frozen=True)
class _Keeper:
    """Keeps what is done, and stops where that is asked for."""

    state: StateFolder
    request: Request
    fingerprint: dict[str, Any]
    blocks: int
    stop: Callable[[], bool]

    def keep(self, run: Conversion, done: int, streams: Streams | None, written: dict[str, Any]) -> None:
        """Commit the state after `done` blocks. StoppedError when it is time to stop."""
        if self.request.work is None or self.request.resume in (None, "never"):
            return
        if self.state.keeps:
            self.state.commit(self.fingerprint, done, *snapshot(run, streams), written)
        if self.request.ranks.any(self.stop()):
            what = f"block {done} of {self.blocks}" if done else "planning"
            raise StoppedError(f"stopped after {what}; the same command goes on from there")


def _opened(request: Request) -> tuple[Conversion, Space | None, TokenSet | None]:
    """The conversion, what a target of bits per weight lets choose, and calibration text where any is needed."""
    source = Checkpoint(request.model)
    if source.config.get("quantization_config"):
        raise ModelError(
            f"{source.folder}: is quantized already (config.json has quantization_config); give its parent"
        )
    arch = architecture_of(source.config)
    shape = Shape.of(source.config)
    last = f"{arch.blocks}.{shape.n_blocks - 1}."
    if not source.names(last):  # before a skeleton of an absurd number of layers is built
        raise ModelError(f"{source.folder}: config.json says {shape.n_blocks} layers but there is no tensor {last}*")
    skeleton = Skeleton(request.model, arch, request.device, request.dtype)
    _check(source, arch, shape, skeleton, request.recipe)
    space = _space(request, arch, skeleton.linears())
    tokens = None
    if space or any(stage.needs_inputs for stage in request.recipe.stages):
        tokens = shared_tokens(request.ranks, lambda: _calibration(request, shape))
    return Conversion(request, source, arch, shape, skeleton), space, tokens


def _settled(run: Conversion, space: Space | None, tokens: TokenSet | None, progress: Progress) -> Conversion:
    """A conversion in which nothing hangs on the whole model any more."""
    if tokens and run.needs_plan:
        run = run.planned(tokens, progress)
        _check_linears(run.request.recipe, run.arch, run.shape, run.skeleton.linears())
    return run.within(space, tokens, progress) if space and tokens else run


def _write_blocks(
    run: Conversion,
    streams: Streams | None,
    done: int,
    writer: CheckpointWriter | NoWriter,
    keeper: _Keeper,
    progress: Progress,
) -> Streams | None:
    """Convert and write all blocks but the first `done`; returns what is left of the streams."""
    if not done and run.request.ranks.first:
        writer.add_shard(run.tensors_outside(run.arch.embedding))
    for index in range(done, keeper.blocks):
        progress("quantizing", index, keeper.blocks)
        tensors = run.block(index, streams)
        require_same_block(run.request.ranks, index, tensors)
        writer.add_shard(tensors)
        if streams and index + 1 == keeper.blocks:
            streams = Streams([], None, streams.dropped)
        keeper.keep(run, index + 1, streams, writer.written)
    return streams


def _finish(run: Conversion, streams: Streams | None, writer: CheckpointWriter, provenance: dict[str, Any]) -> None:
    """Write what stands behind the blocks and let the output appear."""
    writer.add_shard(run.tensors_outside(run.arch.final_norm, run.arch.head))
    for path in run.source.side_files():
        writer.copy(path)
    writer.write_index()
    writer.write_json("config.json", run.config())
    writer.write_json(STATISTICS, run.statistics.as_json())
    facts = provenance | run.results(streams) | {"files": writer.hashes}
    writer.write_json(PROVENANCE, facts | {DIGEST: provenance_digest(facts)})
    writer.commit()


def _check(source: Checkpoint, arch: Architecture, shape: Shape, skeleton: Skeleton, recipe: Recipe) -> None:
    """Everything that can be refused before the first block is computed."""
    skeleton.check(source.shapes, shape.tied)
    require_tied(source, arch, shape)
    source.side_files()
    unknown = [
        n for i in range(shape.n_blocks) for n in skeleton.linear_shapes(i) if n not in skeleton.block_arch(i).roles
    ]
    if unknown:
        raise ModelError(f"{arch.model_type}: linear {unknown[0]} has no role; add it in quantize/arch.py")
    if recipe.head_bits is not None and shape.tied and not Basis(recipe.stages).unties(shape):
        raise ModelError(f"head_bits: {arch.head} shares its weights with the embedding; remove head_bits")
    if recipe.head_bits is not None and shape.hidden % HEAD_GROUP:
        raise ModelError(f"head_bits: {shape.hidden} inputs of {arch.head} are no multiple of the group {HEAD_GROUP}")
    for index, field, problem in format_problems(recipe):
        raise RecipeError(f"recipe {recipe.name}: stages[{index}].{field}: {problem}")
    config = source.config
    for stage in recipe.stages:
        config = stage.config(config)
    if not any(stage.needs_plan for stage in recipe.stages):  # else its linears are not known yet
        _check_linears(recipe, arch, shape, skeleton.linears())


def _check_linears(recipe: Recipe, arch: Architecture, shape: Shape, linears: dict[str, tuple[int, int]]) -> None:
    """Refuse what a stage cannot handle. linears: full name → [N, K], those of the source."""
    for stage in recipe.stages:
        stage.check_model(arch, shape, linears)
        stage.check(linears)
        linears = stage.linears(linears)


def _space(request: Request, arch: Architecture, linears: dict[str, tuple[int, int]]) -> Space | None:
    """What a target of bits per weight lets choose; None without a target."""
    target = request.recipe.target_bpw if request.target_bpw is None else request.target_bpw
    if target is not None and any(stage.kind == "restructure" for stage in request.recipe.stages):
        raise UsageError(
            f"target_bpw {target:g}: a recipe that restructures has none; convert with the restructure stage alone, "
            "then its output with the others and a target"
        )
    return None if target is None else Space.of(request.recipe, arch, linears, target)


def _calibration(request: Request, shape: Shape) -> TokenSet:
    c = request.recipe.calibration
    tokens = calibration_tokens(
        load_tokenizer(request.model),
        dataset=c.dataset,
        nsamples=c.nsamples,
        seqlen=c.seqlen,
        seed=c.seed,
        chat_template=c.chat_template,
        text_field=c.text_field,
    )
    check_vocab(tokens.tokens, shape.vocab)
    return tokens


def _writer(
    request: Request, shards: int, kept: Path | None, written: Mapping[str, Any]
) -> CheckpointWriter | NoWriter:
    return CheckpointWriter(request.output, shards, kept, written) if request.ranks.first else NoWriter()


def _surroundings(request: Request, source: Checkpoint, tokens: TokenSet | None) -> dict[str, Any]:
    """What must be alike for all ranks to compute the same, by name."""
    sizes = {name: (source.folder / name).stat().st_size for name in ("config.json", *source.shards)}
    numerics = {"processor": processor(request.device), "threads": torch.get_num_threads()}
    return numerics | {"sizes of the source": sizes} | _fingerprint(request, {}, tokens)


def _fingerprint(request: Request, hashes: Mapping[str, str], tokens: TokenSet | None) -> dict[str, Any]:
    """All that decides what is written, by name; a state of another fingerprint is not gone on from."""
    facts = _provenance(request, hashes, tokens)
    told = {"recipe": request.recipe.model_dump(mode="json"), "target_bpw": request.target_bpw}
    return told | {key: facts[key] for key in facts if key != "recipe"} | {"batch_tokens": request.batch_tokens}


def _provenance(request: Request, hashes: Mapping[str, str], tokens: TokenSet | None) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {
        "pq": quantize.__version__,
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"device": request.device.type, "dtype": str(request.dtype).removeprefix("torch.")},
        "recipe": {"name": request.recipe.name, "resolved": resolved_yaml(request.recipe)},
        "source": dict(hashes),
        "calibration": None if tokens is None else {"sha256": tokens.sha256, **tokens.origin},
    }
