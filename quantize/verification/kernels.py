"""Running the kernels on the very tensors of a checkpoint beside their plain-torch twins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.errors import VerifyError
from quantize.formats.kv4 import fake_quantize
from quantize.formats.packed_int import IntScheme
from quantize.formats.scheme import AnyScheme
from quantize.kernels.attention.api import takes
from quantize.kernels.attention.reference import attend
from quantize.kernels.device import has_kernel, runs_on
from quantize.kernels.int4 import api as int4
from quantize.model.attention import KvAttention
from quantize.model.load import fill_kv, kv_attention, packed_linear
from quantize.serving.native_linear import NativeLinear
from quantize.serving.register import LINEARS
from quantize.verification.checks import Skipped, summarize
from quantize.verification.layout import Layout
from quantize.verification.parent import Tick

_ROWS = (1, 17, 129)
"""Rows of activations: kernels for one token, for a few, and for many."""
_TOKENS = ((1, 65), (33, 33))
"""New tokens and all tokens of attention: a step of decoding, and a prompt."""
_FEW_ROWS = (1, 17)
_FEW_OUTPUTS = 128
"""For the interpreter, which is slow."""
_LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
"""Of the norm of the difference relative to the twin's, by the dtype of activations: a few
times what rounding to 16 bits leaves. A lower limit would fault sums in another order."""


@torch.no_grad()
def check_kernels(
    layout: Layout, blocks: Sequence[int], seed: int, device: torch.device, tick: Tick
) -> str:
    """Every packed linear, and attention on the cache, computes what its twin
    computes from the same tensors.

    Inputs are random, with some channels much larger than others, bfloat16 on a GPU. In
    Triton's interpreter (a device without kernels of its own) only `blocks` are run, and
    of linears some outputs. VerifyError names what differs; Skipped where no kernel runs
    or takes any of the tensors.
    """
    if not runs_on(device):
        raise Skipped(f"no kernel runs on {device.type}; set TRITON_INTERPRET=1, or --device cuda")
    interpreted = device.type != "cuda"
    dtype = torch.float32 if interpreted else torch.bfloat16
    prefixes = [
        f"{layout.arch.blocks}.{index}."
        for index in (blocks if interpreted else range(layout.shape.n_blocks))
    ]
    names = [name for name in layout.schemes if not interpreted or name.startswith(tuple(prefixes))]
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, float] = {}
    for done, name in enumerate(names):
        tick(done, len(names))
        found = _linear_error(
            layout, name, layout.schemes[name], device, dtype, interpreted, generator
        )
        errors |= {} if found is None else {name: found}
    for prefix in prefixes if layout.attention is not None else ():
        found = _attention_error(layout, prefix, device, dtype, generator)
        errors |= {} if found is None else {f"{prefix}{layout.arch.attention}": found}
    if not errors:
        raise Skipped("no kernel takes any of its tensors")
    limit = _LIMITS[dtype]
    if wrong := [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= limit]:
        raise VerifyError(
            f"a kernel differs from its twin (limit {limit:.0e}) in {summarize(wrong)}"
        )
    where = "the interpreter, sampled" if interpreted else str(device)
    return f"kernels compute {len(errors)} layers as their twins do, within {max(errors.values()):.1e} ({where})"


def _linear_error(
    layout: Layout,
    name: str,
    scheme: AnyScheme,
    device: torch.device,
    dtype: torch.dtype,
    interpreted: bool,
    generator: torch.Generator,
) -> float | None:
    """The largest relative difference over numbers of rows; None where
    no kernel takes the layer."""
    if type(scheme) not in LINEARS:  # llama.cpp's blocks, which its kernels multiply
        return None
    N, K = layout.linears.get(name) or (layout.shape.vocab, layout.shape.hidden)
    kept = min(N, _FEW_OUTPUTS) if interpreted else N
    layer = _native(layout, name, scheme, K, kept).to(device)
    twin = packed_linear(layout.source, name, scheme, device, torch.float32, "kernel")
    worst = None
    for M in _FEW_ROWS if interpreted else _ROWS:
        x = _uneven(generator, M, K).to(device, dtype)
        if not _has_kernel(layer, x):
            return None
        worst = max(worst or 0.0, _difference(layer(x), twin(x.float())[:, :kept]))
    return worst


def _native(
    layout: Layout, name: str, scheme: AnyScheme, K: int, kept: int
) -> NativeLinear[AnyScheme]:
    """The layer as the native loader makes it, with its first outputs alone."""
    bias = f"{name}.bias" in layout.source
    layer: NativeLinear[AnyScheme] = LINEARS[type(scheme)](K, kept, bias, scheme)
    tensors = {}
    for suffix, (_, wanted) in scheme.layout(kept, K).items():
        tensor = layout.source.tensor(f"{name}.{suffix}")
        tensors[suffix] = (
            torch.tensor([kept, K]) if suffix == "weight_shape" else tensor[: wanted[0]]
        )
    if bias:
        tensors["bias"] = layout.source.tensor(f"{name}.bias")[:kept].float()
    layer.load_state_dict({suffix: tensor.contiguous() for suffix, tensor in tensors.items()})
    return layer


def _has_kernel(layer: NativeLinear[AnyScheme], x: Tensor) -> bool:
    scheme = layer.scheme
    if isinstance(scheme, IntScheme):
        return int4.takes(scheme.bits, scheme.group(x.shape[-1]), x, scheme.fp8_activations)
    return has_kernel(x)


def _attention_error(
    layout: Layout,
    prefix: str,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> float | None:
    assert layout.attention is not None
    kv, shape = kv_attention(layout.attention, layout.shape), layout.shape
    fill_kv(kv, layout.source, f"{prefix}{layout.arch.attention}.")
    kv = kv.to(device)
    worst = 0.0
    for T, L in _TOKENS:
        query = _uneven(generator, shape.n_heads, T, shape.head_dim)[None].to(device, dtype)
        key, value = (
            _uneven(generator, shape.n_kv_heads, L, shape.head_dim)[None].to(device, dtype)
            for _ in range(2)
        )
        if not takes(query, kv.scheme):
            return None
        scaling = shape.head_dim**-0.5
        worst = max(
            worst,
            _difference(
                kv(query, key, value, None, scaling), _twin(kv, query, key, value, scaling)
            ),
        )
    return worst


def _twin(kv: KvAttention, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    maps = kv.affine(query.device)
    key, value, S = kv.entering(key, value)
    k, v = (
        fake_quantize(key.float() * S[:, None], kv.scheme),
        fake_quantize(value.float(), kv.scheme),
    )
    q = kv.rounded_query(query if maps is None else maps.queries(query), S)
    mixed = attend(q, k, v, None, scaling, kv.numerics.fp8_probabilities, whole_top=True)
    return mixed if maps is None else maps.output(mixed, mixed.dtype)


def _uneven(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal values of which one channel in 32 is 20 times larger."""
    scale = torch.ones(shape[-1])
    scale[torch.randperm(shape[-1], generator=generator)[: max(1, shape[-1] // 32)]] = 20.0
    return torch.randn(*shape, generator=generator) * scale


def _difference(given: Tensor, wanted: Tensor) -> float:
    size = wanted.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((given.double() - wanted.double()).norm() / size)
