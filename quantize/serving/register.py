"""pq's own format as a quantization method of transformers: `from_pretrained` and
`save_pretrained` of packed models.

`register` runs while transformers is still importing itself: modules that need
its models are imported later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quantize.errors import ModelError
from quantize.formats.bitvec import SUFFIXES as BITVEC_SUFFIXES
from quantize.formats.bitvec import BitVecScheme
from quantize.formats.kv4 import KV_TENSORS
from quantize.formats.native import (
    NATIVE,
    attention_of,
    experts_of,
    packed_linears,
    require_understood,
    rotated_inputs_of,
    routing_of,
)
from quantize.formats.packed_int import SUFFIXES as INT_SUFFIXES
from quantize.formats.packed_int import IntScheme
from quantize.formats.scheme import STORED_AS
from quantize.model.arch import CONTAINER, Shape
from quantize.model.dense_ffn import place_native_experts
from quantize.model.hadamard import let_rotate_inputs
from quantize.model.moe import Policy, Router, place_experts, stack_experts
from quantize.model.transformers_api import plain_config, sizes_of
from quantize.model.transformers_names import Conversion
from quantize.serving.bitvec_linear import BitVecLinear
from quantize.serving.gated_ffn import place_gated_ffns
from quantize.serving.int_linear import IntLinear
from quantize.serving.native_linear import NativeLinear
from quantize.serving.transformers_quantizer import (
    QuantizationConfigMixin,
    Quantizer,
    register_quantizer,
)
from quantize.tested import warn_untested

LINEARS: Mapping[type, type[NativeLinear[Any]]] = {IntScheme: IntLinear, BitVecScheme: BitVecLinear}
_PACKED = {*INT_SUFFIXES, *BITVEC_SUFFIXES}
_OURS = (*(f".{suffix}" for suffix in _PACKED), *(f".{name}" for name in KV_TENSORS))


def register() -> None:
    """Make `quant_method: pq` known to transformers; does nothing the second time."""
    warn_untested()
    register_quantizer(NATIVE, PqConfig, PqQuantizer)


_HEAD = "lm_head"


class PqConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """quantization_config of a native checkpoint, kept as it was read; ModelError for
    one that is not understood."""

    def __init__(self, **fields: Any) -> None:
        try:
            require_understood(fields)
        except ValueError as err:
            raise ModelError(f"quantization_config: {err}") from None
        self.__dict__.update(fields)


class PqQuantizer(Quantizer):
    """Puts packed linears and attention on the INT4 KV cache into a model
    before its weights are loaded.

    The attention implementation is always `pq` where the checkpoint asks for the cache: others
    would read keys and values that are not scaled back. Raises ModelError for tensors that are
    missing or do not fit, before any is read.
    """

    def prepare(self, model: Any, files: Sequence[str]) -> None:
        """Place packed linears, experts and attention; ModelError for tensors that do not fit."""
        try:
            _place_experts(model, self.quantization_config.to_dict())
            self._place_linears(model)
            place_gated_ffns(model)
            if attention := attention_of(self.quantization_config.to_dict()):
                _place_attention(model, attention)
            if files:
                _require_tensors(model, _headers(files))
        except (ValueError, ModelError) as err:
            raise ModelError(f"{model.name_or_path}: {err}") from None

    def _place_linears(self, model: Any) -> None:
        inner, head = _inner_prefix(model), model.get_output_embeddings()
        linears = {
            name if module is head else _full_name(model, name): (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and not isinstance(module, Router)
            and (name.startswith(inner) or module is head)
        }
        # A decoder without its head has no place for a packed one.
        schemes = packed_linears(self.quantization_config.to_dict(), [*linears, _HEAD])
        for full, scheme in schemes.items():
            if full not in linears:
                continue
            name, old = linears[full]
            try:
                new = LINEARS[type(scheme)](
                    old.in_features, old.out_features, old.bias is not None, scheme
                )
            except ValueError as err:
                raise ValueError(f"{full}: {err}") from None
            model.set_submodule(name, new)
        for full in rotated_inputs_of(self.quantization_config.to_dict(), set(linears) - {_HEAD}):
            try:
                let_rotate_inputs(model.get_submodule(linears[full][0]))
            except ValueError as err:
                raise ValueError(f"{full}: {err}") from None

    def finish(self, model: Any) -> None:
        """Refuse what the headers did not show, and let the model work on its INT4 cache."""
        for name, module in model.named_modules():
            if isinstance(module, NativeLinear):
                _require_loaded(f"{model.name_or_path}: {_full_name(model, name)}", module)
                for suffix in module.scheme.suffixes:
                    getattr(module, suffix).requires_grad_(False)
        stack_experts(model)
        if attention_of(self.quantization_config.to_dict()):
            from quantize.serving.kv_cache import use_int4_cache

            use_int4_cache(model)


def _full_name(model: Any, name: str) -> str:
    """Name that a module or tensor of `model` has in the causal language model,
    and so in the checkpoint."""
    return name if _has_head(model) else f"{model.base_model_prefix}.{name}"


def _has_head(model: Any) -> bool:
    """Whether it is more than the decoder alone."""
    return hasattr(model, model.base_model_prefix) or model.get_output_embeddings() is not None


def _inner_prefix(model: Any) -> str:
    """What the names of the decoder start with inside `model`: empty where the
    model is the decoder alone."""
    return f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""


def _stored_by_own_names(
    model: Any, found: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Stored tensors by the names that `model` has for them."""
    conversion = Conversion(model)
    missing = "" if _has_head(model) else f"{model.base_model_prefix}."
    places = ((name, conversion.place(name)) for name in found)
    # Experts that stand by themselves are under their own names, which transformers would stack.
    return {
        (place if converter is None else name.removeprefix(missing)): found[name]
        for name, (place, converter, _) in places
    }


def _place_experts(model: Any, section: Mapping[str, Any]) -> None:
    policies: Mapping[str, Policy] = routing_of(section)
    if sizes := experts_of(section):
        missing = "" if _has_head(model) else f"{model.base_model_prefix}."
        here = {name.removeprefix(missing): policy for name, policy in policies.items()}
        place_native_experts(model, sizes, here)
        return
    if model.config.model_type != CONTAINER:
        if policies:
            raise ValueError(f"routing names {min(policies)}, which has no experts in this model")
        return
    # A decoder alone has shorter names.
    whole = nn.ModuleDict({model.base_model_prefix: model.base_model})
    place_experts(whole, f"{model.base_model_prefix}.layers", model.config.to_dict(), policies)


def _place_attention(model: Any, facts: Mapping[str, Any]) -> None:
    from quantize.model.attention import ATTENTION, KvAttention, KvNumerics
    from quantize.model.skeleton import Skeleton

    shape = Shape.of(sizes_of(model.config))
    numerics = KvNumerics.from_json(facts)
    with torch.device("cpu"):  # the loader's is the model's
        skeleton = Skeleton.of_config(plain_config(model.config), torch.float32)
        inner = skeleton.outer.blocks.removeprefix(f"{model.base_model_prefix}.")
        blocks = model.base_model.get_submodule(inner)
        kinds = [
            (skeleton.block_arch(i), skeleton.block_shape(i, shape)) for i in range(len(blocks))
        ]
    for block, (arch, here) in zip(blocks, kinds, strict=True):
        if arch.no_cache:
            continue
        kv = KvAttention(numerics, here.n_kv_heads, here.head_dim)
        # The loader gives a tensor the dtype of its place, and here the
        # default is that of the model.
        for name, size in numerics.tensors(here.n_kv_heads, here.head_dim).items():
            setattr(kv, name.removeprefix("kv."), torch.ones(size, dtype=torch.float32))
        block.get_submodule(arch.attention).kv = kv
    model.set_attn_implementation(ATTENTION)


def _headers(files: Sequence[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype (as safetensors calls it) and shape of every tensor in the files, by name."""
    return {name: header for file in files for name, header in _header(Path(file))}


def _header(file: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no dict
                part = opened.get_slice(name)
                yield name, (part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError) as err:
        raise ValueError(
            f"{file.name} is no readable safetensors file ({err}); download it again"
        ) from None


def _require_tensors(model: Any, found: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """ValueError unless every tensor of the decoder and its head is there; transformers
    would invent what is not."""
    inner, tied = _inner_prefix(model), getattr(model, "all_tied_weights_keys", {})
    head = {id(t) for t in _tensors_of(model.get_output_embeddings())}
    expected = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in tied and (name.startswith(inner) or id(tensor) in head)
    }
    stored = _stored_by_own_names(model, found)
    for name, tensor in expected.items():
        full = _full_name(model, name)
        if name not in stored:
            raise ValueError(f"tensor {full} is missing from the checkpoint; download it again")
        dtype, shape = stored[name]
        wanted = STORED_AS[tensor.dtype] if name.rpartition(".")[2] in _PACKED else dtype
        if (dtype, shape) != (wanted, tuple(tensor.shape)):
            raise ValueError(
                f"tensor {full} is {dtype} {list(shape)}, config.json implies {wanted} "
                f"{list(tensor.shape)}"
            )
    if surplus := sorted(name for name in set(stored) - set(expected) if name.endswith(_OURS)):
        raise ValueError(
            f"tensor {surplus[0]} has no place in the model; config.json and weights disagree"
        )


def _tensors_of(module: nn.Module | None) -> list[Tensor]:
    return [] if module is None else list(module.state_dict(keep_vars=True).values())


def _require_index(name: str, module: NativeLinear[Any]) -> None:
    """ModelError for lines outside the cache, where a kernel would read what is not its own."""
    if isinstance(module, BitVecLinear):
        lines, largest = (
            module.scheme.lines * module.scheme.scales,
            int(module.weight_index.int().max()),
        )
        if largest >= lines:
            raise ModelError(
                f"{name}.weight_index names line {largest} of a codebook of {lines}; download it "
                "again"
            )


def _require_loaded(name: str, module: NativeLinear[Any]) -> None:
    """ModelError for what the headers do not show."""
    wanted = [module.out_features, module.in_features]
    if not module.weight_shape.is_meta:
        if module.weight_shape.tolist() != wanted:
            raise ModelError(
                f"{name}.weight_shape says {module.weight_shape.tolist()}, config.json implies "
                f"{wanted}"
            )
        _require_index(name, module)
        return
    # Early releases of transformers 5 read what stays on the disk as floats, and packed
    # integers come out as others.
    offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if offloaded is not None and offloaded["weight_shape"].dtype != torch.int64:
        raise ModelError(
            f"{name} cannot be left on the disk by this release of transformers; install a newer "
            "one or load the model with a device_map without 'disk'"
        )
