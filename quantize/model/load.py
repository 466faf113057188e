"""A whole model in memory, its packed linears computing with the serving kernel's numerics."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint
from quantize.formats.bitvec import SUFFIXES as BITVEC_SUFFIXES
from quantize.formats.gguf.blocks import SUFFIXES as BLOCK_SUFFIXES
from quantize.formats.kv4 import KV_TENSORS as KV_TENSORS
from quantize.formats.output import OutputFormat
from quantize.formats.packed_int import SUFFIXES as INT_SUFFIXES
from quantize.formats.registry import format_in, schemes_in
from quantize.formats.scheme import AnyScheme
from quantize.formats.vllm_kv4 import VllmInt4
from quantize.model.arch import Shape
from quantize.model.attention import KvAttention, KvNumerics
from quantize.model.attention_cache import CacheNumerics
from quantize.model.attention_vllm import VllmKvAttention
from quantize.model.build import meta_model
from quantize.model.dequantized import open_source
from quantize.model.hadamard import let_rotate_inputs
from quantize.model.linear import Numerics, PackedLinear
from quantize.model.moe import Policy, Router
from quantize.model.skeleton import Skeleton, as_computed
from quantize.model.storage import DTYPES
from quantize.model.stored import open_stored
from quantize.model.transformers_api import decoder_facts, load_pretrained, load_tensors
from quantize.model.transformers_decoder import renew_buffers

log = logging.getLogger(__name__)

PACKED_SUFFIXES = tuple(dict.fromkeys((*INT_SUFFIXES, *BITVEC_SUFFIXES, *BLOCK_SUFFIXES)))
"""Names of packed tensors after the linear's own, of all layouts."""
_NO_CODES = ("I64", "BOOL")
"""dtypes of positions and masks, and never of weights."""


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    numerics: Numerics = "kernel",
    attention: CacheNumerics | None = None,
) -> nn.Module:
    """Load a plain or packed checkpoint; packed linears compute with the given numerics.

    attention: how to attend where the checkpoint does not say, None: in full precision.
    ModelError for a packing that pq does not read or tensors that do not match it.
    """
    on_disk = open_source(folder)
    require_readable(on_disk)
    for note in on_disk.notes:
        log.warning("%s", note)
    if on_disk.config.get("quantization_config") is None and attention is None:
        return _load_plain(on_disk, device, dtype)
    source, built = open_stored(on_disk, dtype)
    skeleton = Skeleton(folder, device, dtype, routing(source), built)
    model, arch = skeleton.model, skeleton.arch
    linears = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and not isinstance(m, Router)
    ]
    schemes = packed_schemes(source, linears)
    kv_numerics = attention_numerics(source) or attention
    if kv_numerics is not None:
        for index, layer in enumerate(model.get_submodule(arch.blocks)):
            place_kv(skeleton, index, layer, kv_numerics, shape_of(source))
    _materialize(model, source, schemes, device, dtype, numerics)
    rotated_inputs(source, [name for name in linears if name.startswith(f"{arch.blocks}.")])
    _rotate_inputs(model, source)
    return _freeze(model.to(device))


def require_readable(source: Checkpoint) -> None:
    """ModelError for a packing that pq does not read, and for packed tensors
    without a word in config.json."""
    quantization = source.config.get("quantization_config")
    if quantization is None:
        for name, dtype in source.dtypes.items():
            if dtype not in (*DTYPES, *_NO_CODES):
                raise ModelError(
                    f"{source.folder}: {name} is {dtype}, but config.json has no "
                    "quantization_config that says what it means; give the original model"
                )
        return
    form = format_in(quantization)
    if form is None:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        raise ModelError(f"{source.folder}: quant_method {method!r} is not one that pq reads")
    try:
        form.require_understood(quantization)
    except ValueError as err:
        raise ModelError(f"{source.folder}/config.json: quantization_config: {err}") from None


def shape_of(source: Checkpoint) -> Shape:
    """Sizes of a checkpoint's text decoder; ModelError names a missing or absurd field."""
    return Shape.of(decoder_facts(source.folder, source.config))


def tensors_of(source: Checkpoint, modules: Iterable[str]) -> dict[str, Tensor]:
    """Full name → tensor, of these modules; those that a checkpoint lacks (a tied head) are left out."""
    return {
        f"{module}.{name}": tensor
        for module in modules
        for name, tensor in source.tensors(f"{module}.").items()
    }


def require_layers(source: Checkpoint, shape: Shape) -> None:
    """ModelError for more layers than the checkpoint has tensors of, before a skeleton of an absurd
    number of them is built."""
    last = f".{shape.n_blocks - 1}."
    if any(last in f".{name}" for name in source.shapes):
        return
    first = next((name.partition(".0.")[0] for name in source.shapes if ".0." in name), "*")
    raise ModelError(
        f"{source.folder}: config.json says {shape.n_blocks} layers but there is no tensor "
        f"{first}{last}*"
    )


def _format(source: Checkpoint) -> tuple[OutputFormat, Mapping[str, Any]] | None:
    """The format of a checkpoint and its quantization_config; None for a plain model and
    for what pq does not know."""
    section: Any = source.config.get("quantization_config")
    form = format_in(section)
    return None if form is None else (form, section)


def packed_schemes(source: Checkpoint, linears: Sequence[str]) -> dict[str, AnyScheme]:
    """Scheme of every packed linear by full name, empty for a plain model; ModelError for
    schemes pq does not read."""
    try:
        return schemes_in(source.config.get("quantization_config") or {}, linears)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ModelError(
            f"{source.folder}/config.json: quantization_config is not one that pq reads ({err})"
        ) from None


def kv_attention(numerics: KvNumerics, shape: Shape) -> KvAttention:
    """A module for attention on the cache, all its scales 1; ModelError where the
    head does not fit the groups."""
    try:
        return KvAttention(numerics, shape.n_kv_heads, shape.head_dim)
    except ValueError as err:
        raise ModelError(f"INT4 KV cache: {err}") from None


def attention_numerics(source: Checkpoint) -> KvNumerics | None:
    """How the checkpoint attends on an INT4 cache; None for one that has none. ModelError
    for what pq does not read."""
    found = _format(source)
    if found is None:
        return None
    form, section = found
    try:
        facts = form.attention(section)
        return None if facts is None else KvNumerics.from_json(facts)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ModelError(
            f"{source.folder}/config.json: attention is not one that pq reads ({err})"
        ) from None


def rotated_inputs(source: Checkpoint, linears: Collection[str] | None = None) -> tuple[str, ...]:
    """Full names of the linears that rotate their inputs; ModelError for what pq does not read.

    linears: full names of those of the blocks; None: names are not checked.
    """
    found = _format(source)
    if found is None:
        return ()
    form, section = found
    try:
        return form.rotated_inputs(section, linears)
    except ValueError as err:
        raise ModelError(f"{source.folder}/config.json: quantization_config: {err}") from None


def routing(source: Checkpoint) -> Mapping[str, Policy]:
    """How FFNs with experts route, by full name, where not as config.json's own fields
    say; ModelError as above."""
    found = _format(source)
    if found is None:
        return {}
    form, section = found
    try:
        return form.routing(section)
    except ValueError as err:
        raise ModelError(f"{source.folder}/config.json: quantization_config: {err}") from None


def _rotate_inputs(module: nn.Module, source: Checkpoint, prefix: str = "") -> None:
    """Let the linears below `module`, whose names begin with `prefix` in the checkpoint,
    rotate inputs as it says."""
    for name in rotated_inputs(source):
        if name.startswith(prefix):
            try:
                let_rotate_inputs(module.get_submodule(name.removeprefix(prefix)))
            except ValueError as err:
                raise ModelError(f"{source.folder}: {name}: {err}") from None


def packed_linear(
    source: Checkpoint,
    name: str,
    scheme: AnyScheme,
    device: torch.device,
    dtype: torch.dtype,
    numerics: Numerics,
) -> PackedLinear:
    """Read the packed linear with this full name; ModelError when its
    tensors do not fit the scheme."""
    parts = {suffix: source.tensor(f"{name}.{suffix}").to(device) for suffix in scheme.suffixes}
    try:
        packed = scheme.read(parts)
    except ValueError as err:
        raise ModelError(f"{source.folder}: {name}: {err}") from None
    bias = source.tensor(f"{name}.bias") if f"{name}.bias" in source else None
    return PackedLinear(packed, bias, scheme.fp8_activations, dtype, numerics).to(device)


def load_block(
    source: Checkpoint,
    skeleton: Skeleton,
    schemes: Mapping[str, AnyScheme],
    index: int,
    numerics: Numerics,
    attention: CacheNumerics | None = None,
) -> nn.Module:
    """Materialize block `index` of a plain or packed checkpoint.

    schemes: those of its packed linears by full name. attention: how it works on its
    cache (`attention_numerics`).
    """
    prefix = f"{skeleton.arch.blocks}.{index}."
    packed = {
        name.removeprefix(prefix): packed_linear(
            source, name, scheme, skeleton.device, skeleton.dtype, numerics
        )
        for name, scheme in schemes.items()
        if name.startswith(prefix)
    }
    inside = {f"{prefix}{name}.{part}" for name in packed for part in (*PACKED_SUFFIXES, "bias")}
    attending = f"{prefix}{skeleton.block_arch(index).attention}."
    weights = {
        n.removeprefix(prefix): source.tensor(n)
        for n in source.names(prefix)
        if n not in inside and n.removeprefix(attending) not in KV_TENSORS
    }
    layer = skeleton.layer(index, weights, packed)
    _rotate_inputs(layer, source, prefix)
    if attention is not None:
        kv = place_kv(skeleton, index, layer, attention, shape_of(source))
        if isinstance(kv, KvAttention):
            fill_kv(kv, source, attending)
            kv.to(skeleton.device)
    return layer


def fill_kv(kv: KvAttention, source: Checkpoint, attending: str) -> None:
    """Read what is stored for `kv`, below the name `attending` with its dot; an S that is not there
    is one. ModelError where shifts or rotations are missing."""
    for name in kv.numerics.tensors(*kv.scale.shape):
        if f"{attending}{name}" in source:
            setattr(kv, name.removeprefix("kv."), source.tensor(f"{attending}{name}"))
        elif name != KV_TENSORS[0]:
            raise ModelError(
                f"{source.folder}: tensor {attending}{name} is missing; download it again"
            )


def place_kv(
    skeleton: Skeleton, index: int, layer: nn.Module, numerics: CacheNumerics, shape: Shape
) -> KvAttention | VllmKvAttention | None:
    """Let block `index` attend on an INT4 cache, all scales 1; None where its kind of attention
    cannot, which then keeps 16 bits."""
    arch = skeleton.block_arch(index)
    if arch.no_cache:
        return None
    kv: KvAttention | VllmKvAttention
    if isinstance(numerics, VllmInt4):
        kv = VllmKvAttention(numerics)
    else:
        kv = kv_attention(numerics, skeleton.block_shape(index, shape)).to(skeleton.device)
    layer.get_submodule(arch.attention).kv = kv
    return kv


def _load_plain(source: Checkpoint, device: torch.device, dtype: torch.dtype) -> nn.Module:
    folder = source.folder
    meta_model(folder, dtype)  # refuses a broken config.json in one line
    try:
        if source.dequantized:  # as pq reads it, wherever transformers would run it
            model, missing = load_tensors(folder, source.tensors(""), dtype)
        else:
            model, missing = load_pretrained(folder, dtype)
    except (RuntimeError, ValueError, OSError) as err:
        reason = " ".join(str(err).split())[:300]
        raise ModelError(f"{folder}: transformers cannot load this model ({reason})") from None
    if missing:
        # transformers would go on with random weights.
        raise ModelError(f"{folder}: tensor {missing[0]} is missing from the checkpoint")
    return _freeze(model.to(device))


def _materialize(
    model: nn.Module,
    source: Checkpoint,
    schemes: dict[str, AnyScheme],
    device: torch.device,
    dtype: torch.dtype,
    numerics: Numerics,
) -> None:
    for name, scheme in schemes.items():
        model.set_submodule(name, packed_linear(source, name, scheme, device, dtype, numerics))
    packed_names = {f"{name}.{suffix}" for name in schemes for suffix in (*PACKED_SUFFIXES, "bias")}
    plain = {
        n: as_computed(source.tensor(n), device, dtype)
        for n in source.names()
        if n not in packed_names
    }
    # stays float32
    plain |= {n: source.tensor(n).to(device) for n in plain if n.endswith(KV_TENSORS)}
    try:
        result = model.load_state_dict(plain, assign=True, strict=False)
    except RuntimeError as err:
        raise ModelError(f"{source.folder}: {' '.join(str(err).split())[:300]}") from None
    if missing := [n for n in result.missing_keys if n.endswith(KV_TENSORS[1:])]:
        raise ModelError(f"{source.folder}: tensor {missing[0]} is missing; download it again")
    model.tie_weights()  # type: ignore[operator]  # every transformers model has it
    if result.unexpected_keys:
        raise ModelError(
            f"{source.folder}: tensor {result.unexpected_keys[0]} has no place in the model"
        )
    renew_buffers(model, model, device)
    if missing := [n for n, p in model.named_parameters() if p.is_meta]:
        raise ModelError(f"{source.folder}: tensor {missing[0]} is missing from the checkpoint")


def _freeze(model: nn.Module) -> nn.Module:
    model.eval()
    model.requires_grad_(False)
    return model


def bits_per_weight(model: nn.Module) -> float | None:
    """Mean stored bits of quantized weights, scales counted; None for a model without any."""
    packed = [m.packed for m in model.modules() if isinstance(m, PackedLinear)]
    weights = sum(math.prod(p.shape) for p in packed)
    return (
        sum(p.bits_per_weight * math.prod(p.shape) for p in packed) / weights if weights else None
    )
