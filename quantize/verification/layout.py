"""Whether the tensors of a checkpoint are exactly those that its config.json implies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from quantize.errors import ModelError, UnderivedError, VerifyError
from quantize.files.checkpoint import INDEX_NAME, Checkpoint, read_json
from quantize.files.headers import Header, tensor_headers
from quantize.formats.registry import format_in, open_checkpoint
from quantize.formats.scheme import STORED_AS, AnyScheme
from quantize.model.arch import Architecture, Shape
from quantize.model.attention import KvNumerics
from quantize.model.load import (
    PACKED_SUFFIXES,
    attention_numerics,
    packed_schemes,
    require_layers,
    require_readable,
    rotated_inputs,
    routing,
    shape_of,
)
from quantize.model.skeleton import Skeleton
from quantize.model.stored import StoredCheckpoint, open_stored
from quantize.verification.checks import Skipped, summarize

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Layout:
    """A checkpoint whose tensors fit its config.json."""

    source: StoredCheckpoint
    shape: Shape
    skeleton: Skeleton
    linears: Mapping[str, tuple[int, int]]
    """Full name → [N, K] of every linear of the blocks."""
    schemes: Mapping[str, AnyScheme]
    """Full name → scheme of every packed linear."""
    headers: Mapping[str, Header]
    attention: KvNumerics | None
    """How it attends on an INT4 cache; None where it does not."""

    @property
    def arch(self) -> Architecture:
        """Its first block."""
        return self.skeleton.arch


def read_layout(folder: Path, by_pq: bool, device: torch.device) -> Layout:
    """Open a checkpoint and check every tensor's name, dtype and shape, the
    index and quantization_config.

    by_pq: whether pq wrote it; otherwise a model or packing that pq does not know is
    Skipped. PqError for any misfit.
    """
    on_disk = open_checkpoint(folder)
    if not by_pq:
        _skip_foreign(on_disk)
    require_readable(on_disk)
    shape = shape_of(on_disk)
    require_layers(on_disk, shape)
    try:
        source, model = open_stored(on_disk, torch.float32)
        skeleton = Skeleton(folder, device, torch.float32, routing(source), model)
    except ModelError as err:
        # What pq's own format says of a model that pq knows is wrong, whoever wrote it.
        form = format_in(on_disk.config.get("quantization_config"))
        ours = form is not None and form.keeps_experts
        if by_pq or (ours and not isinstance(err, UnderivedError)):
            raise
        raise Skipped(f"pq did not write this model and cannot read it ({err})") from None
    head = skeleton.parts.head
    linears = skeleton.linears()
    rotated_inputs(source, linears)
    schemes = packed_schemes(source, [*linears, head])
    if head in schemes and not shape.tied:
        linears[head] = (shape.vocab, shape.hidden)
    layout = Layout(
        source,
        shape,
        skeleton,
        linears,
        schemes,
        tensor_headers(source),
        attention_numerics(source),
    )
    if by_pq and on_disk.problems:
        raise VerifyError(summarize([f"{folder}/{line}" for line in on_disk.problems]))
    if by_pq and (left := source.leftovers.ignored):
        raise VerifyError(summarize([f"tensor {name} has no place in the model" for name in left]))
    _check_coverage(layout)
    _check_packed(layout)
    _check_plain(layout)
    if by_pq:
        _check_total(layout)
    return layout


def describe(layout: Layout) -> str:
    """What was found, in a line."""
    shards, carried = len(layout.source.shards), len(layout.source.leftovers.carried_names)
    tensors = len(layout.headers) + carried
    return f"{tensors} tensors in {shards} shards, {len(layout.schemes)} packed linears"


def _skip_foreign(source: Checkpoint) -> None:
    quantization = source.config.get("quantization_config")
    if quantization is None:
        return
    form = format_in(quantization)
    try:
        known = form is not None and form.reads_others(quantization)
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise Skipped("pq did not write this model and does not know its quantization_config")


def _check_coverage(layout: Layout) -> None:
    """quantization_config and the tensors agree on which linears are packed."""
    for name, scheme in layout.schemes.items():
        group = 1 if scheme.group_size is None else scheme.group_size  # None: whole rows
        if (
            not all(type(n) is int for n in (scheme.bits, group))
            or not 2 <= scheme.bits <= 8
            or group < 1
        ):
            raise VerifyError(
                f"config.json gives {name} {scheme.bits} bits in groups of {scheme.group_size}"
            )
        if name not in layout.linears:
            raise VerifyError(f"config.json says that {name} is packed, which pq never does")
    stored = {n.rpartition(".")[0] for n in layout.headers if n.endswith(PACKED_SUFFIXES)}
    if wrong := sorted(stored - set(layout.schemes)):
        raise VerifyError(
            summarize([f"{n} is packed but config.json does not say how" for n in wrong])
        )
    if wrong := sorted(set(layout.schemes) - stored):
        raise VerifyError(
            summarize([f"config.json says that {n} is packed but it is not" for n in wrong])
        )
    quantization = layout.source.config.get("quantization_config") or {}
    named = list(quantization.get("ignore", ()))
    named += [
        t
        for g in quantization.get("config_groups", {}).values()
        for t in g["targets"]
        if t != "Linear"
    ]
    skeleton = layout.skeleton
    linears = {*layout.linears, layout.arch.head, *skeleton.routers(), *skeleton.linears_outside()}
    known = {called for name in linears for called in layout.source.output.in_config(name)}
    known |= set(layout.source.carried_linears)
    if wrong := sorted(str(n) for n in named if n not in known):
        raise VerifyError(
            summarize(
                [f"config.json's quantization_config names {n}, which is no linear" for n in wrong]
            )
        )


def _check_packed(layout: Layout) -> None:
    for name, scheme in layout.schemes.items():
        N, K = layout.linears[name]
        if scheme.fp8_activations and (scheme.bits, scheme.group_size, N % 128) != (4, 128, 0):
            raise VerifyError(
                f"{name}: FP8 activations with {scheme.bits} bits, group {scheme.group_size}, {N} "
                "outputs"
            )
        try:
            expected = scheme.layout(N, K)
        except ValueError as err:
            raise VerifyError(f"{name}: {err}, as config.json's group_size has it") from None
        for suffix, (stored_as, shape) in expected.items():
            dtype = STORED_AS[stored_as]
            found = layout.headers.get(f"{name}.{suffix}")
            if found is None:
                raise VerifyError(f"tensor {name}.{suffix} is missing")
            if (found.dtype, found.shape) != (dtype, shape):
                raise VerifyError(
                    f"{name}.{suffix} is {found.dtype} {list(found.shape)}, "
                    f"config.json implies {dtype} {list(shape)} ({scheme.bits} bits, group "
                    f"{scheme.group_size})"
                )
        if "weight_shape" not in expected:
            continue
        if (stored := layout.source.tensor(f"{name}.weight_shape").tolist()) != [N, K]:
            raise VerifyError(f"{name}.weight_shape says {stored}, config.json implies {[N, K]}")


def _check_plain(layout: Layout) -> None:
    plain = {n: h for n, h in layout.headers.items() if not n.endswith(PACKED_SUFFIXES)}
    shapes = {n: h.shape for n, h in plain.items()}
    for name in layout.schemes:
        if f"{name}.weight" in plain:
            raise VerifyError(f"{name} is stored twice: packed, and plain as {name}.weight")
        shapes[f"{name}.weight"] = layout.linears[name]
    for name, shape in _kv_tensors(layout).items():
        found = plain.get(name)
        if found is None:
            raise VerifyError(
                f"tensor {name} is missing, config.json says that attention has an INT4 cache"
            )
        if (found.dtype, found.shape) != ("F32", shape):
            raise VerifyError(
                f"{name} is {found.dtype} {list(found.shape)}, expected F32 {list(shape)}"
            )
        del shapes[name]
    layout.skeleton.check(shapes, layout.shape.tied)
    for name, header in plain.items():
        table = header.dtype == "I64"  # which the model has there, as was just checked
        if header.dtype not in FLOATS and not table and not layout.arch.is_beside(name):
            raise VerifyError(f"{name} is {header.dtype}, expected one of {', '.join(FLOATS)}")


def _kv_tensors(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Full name → shape of what there must be of attention on an INT4 cache."""
    if layout.attention is None:
        return {}
    arch, shape = layout.arch, layout.shape
    sizes = layout.attention.tensors(shape.n_kv_heads, shape.head_dim)
    return {
        f"{arch.blocks}.{i}.{arch.attention}.{name}": size
        for i in range(shape.n_blocks)
        for name, size in sizes.items()
    }


def _check_total(layout: Layout) -> None:
    path = layout.source.folder / INDEX_NAME
    if not path.exists():
        return
    metadata = read_json(path).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    stored = tensor_headers(layout.source.stored)
    carried = sum(stored[name].bytes for name in layout.source.leftovers.carried_names)
    total = carried + sum(header.bytes for header in layout.headers.values())
    if stated != total:
        raise VerifyError(f"{path}: total_size is {stated}, the tensors hold {total} bytes")
