"""The conversion loop: one decoder block at a time is loaded, measured, transformed, written and freed."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from typing import Any

import quantize
from quantize.allocation import Space
from quantize.arch import Architecture, Shape, architecture_of
from quantize.basis import Basis
from quantize.calib import TokenSet, calibration_tokens, check_vocab
from quantize.checkpoint import Checkpoint
from quantize.conversion import HEAD_GROUP, Conversion, Progress, Request, Summary
from quantize.errors import ModelError, RecipeError, UsageError
from quantize.provenance import DIGEST, PROVENANCE, provenance_digest
from quantize.recipe import Recipe, format_problems, resolved_yaml
from quantize.skeleton import Skeleton, load_tokenizer
from quantize.statistics import STATISTICS
from quantize.writer import CheckpointWriter, require_free

__all__ = ["Request", "Summary", "convert"]

_VERSIONED = ("torch", "transformers", "compressed-tensors", "safetensors")


def convert(request: Request, progress: Progress = lambda what, done, total: None) -> Summary:
    """Run a recipe over a checkpoint and write the packed result to `request.output`.

    Peak memory holds one decoder block (two where a stage aims at the parent's outputs), its Hessians, the embedding
    matrix and the calibration activations; never the whole model. Equal inputs, seed and versions give equal bytes.
    Raises PqError subclasses; on any error nothing is left at the output.
    """
    started = time.monotonic()
    require_free(request.output)
    source = Checkpoint(request.model)
    arch = architecture_of(source.config)
    shape = Shape.of(source.config)
    last = f"{arch.blocks}.{shape.n_blocks - 1}."
    if not source.names(last):  # before a skeleton of an absurd number of layers is built
        raise ModelError(f"{source.folder}: config.json says {shape.n_blocks} layers but there is no tensor {last}*")
    skeleton = Skeleton(request.model, arch, request.device, request.dtype)
    _check(source, arch, shape, skeleton, request.recipe)
    space = _space(request, arch, skeleton.linears())
    tokens = _calibration(request, shape) if space or any(s.needs_inputs for s in request.recipe.stages) else None
    run = Conversion(request, source, arch, shape, skeleton)
    if tokens and any(stage.needs_plan for stage in request.recipe.stages):
        run = run.planned(tokens, progress)
        _check_linears(run.request.recipe, arch, shape, skeleton.linears())
    if space and tokens:
        run = run.within(space, tokens, progress)
    progress("hashing source", 0, shape.n_blocks)
    provenance = _provenance(run.request, source, tokens)

    streams = run.embed(tokens)
    with CheckpointWriter(request.output, shape.n_blocks + 2) as writer:
        writer.add_shard(run.tensors_outside(arch.embedding))
        for index in range(shape.n_blocks):
            progress("quantizing", index, shape.n_blocks)
            writer.add_shard(run.block(index, streams))
        progress("writing", shape.n_blocks, shape.n_blocks)
        writer.add_shard(run.tensors_outside(arch.final_norm, arch.head))
        for path in source.side_files():
            writer.copy(path)
        writer.write_index()
        writer.write_json("config.json", run.config())
        writer.write_json(STATISTICS, run.statistics.as_json())
        facts = provenance | run.results(streams) | {"files": writer.hashes}
        writer.write_json(PROVENANCE, facts | {DIGEST: provenance_digest(facts)})
        output_bytes = writer.total_size
        writer.commit()
    return run.summary(time.monotonic() - started, output_bytes)


def _check(source: Checkpoint, arch: Architecture, shape: Shape, skeleton: Skeleton, recipe: Recipe) -> None:
    """Everything that can be refused before the first block is computed."""
    if source.config.get("quantization_config"):
        raise ModelError(
            f"{source.folder}: is quantized already (config.json has quantization_config); give its parent"
        )
    skeleton.check(source.shapes, shape.tied)
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


def _provenance(request: Request, source: Checkpoint, tokens: TokenSet | None) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {
        "pq": quantize.__version__,
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"device": request.device.type, "dtype": str(request.dtype).removeprefix("torch.")},
        "recipe": {"name": request.recipe.name, "resolved": resolved_yaml(request.recipe)},
        "source": source.hashes(),
        "calibration": None if tokens is None else {"sha256": tokens.sha256, **tokens.origin},
    }
