"""Attention on an INT4 KV cache (`quantize/formats/kv4.py`) and in FP8, on
whatever device the tensors are.

FireQ (arXiv 2505.20839): queries and probabilities are E4M3, keys and values INT4 (or, in prefill,
E4M3); keys are stored times a scale S per channel, and queries divided by it. Triton computes it on
NVIDIA devices that know E4M3, in launches that depend on shapes alone, so that CUDA graphs can hold
them; torch does it elsewhere. Results are the same in every run. Nothing here has gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantize.formats.fp8 import E4M3_MAX, e4m3
from quantize.formats.kv4 import KvScheme
from quantize.kernels.attention import ops
from quantize.kernels.attention.checks import (
    check_fp8,
    check_head,
    check_query,
    check_records,
    check_rows,
    check_states,
    checked_mask,
    scheme_fits,
)
from quantize.kernels.device import has_fp8_kernel


def takes(x: Tensor, scheme: KvScheme) -> bool:
    """Whether a Triton kernel can work on queries, keys or values x [..., d]
    and a cache of this scheme."""
    return scheme_fits(scheme, x.shape[-1]) and has_fp8_kernel(x)


def quantize_records(
    key: Tensor, value: Tensor, S: Tensor, scheme: KvScheme
) -> tuple[Tensor, Tensor]:
    """key and value [B, Hkv, T, d] (bfloat16, float16 or float32), S float32
    [Hkv, d] → records of K·S and of V.

    Both are uint8 [B, Hkv, T, R], bit for bit those of `kv4.quantize` on a CPU
    (but for what NaN looks like).
    ValueError for wrong shapes or dtypes, or a layout that no kernel knows (`scheme_fits`).
    """
    check_states(key, value, S)
    check_head(key.shape[3], scheme)
    found: tuple[Tensor, Tensor] = ops.quantize_records(
        _rows(key), _rows(value), S, *_facts(scheme)
    )
    return found


def append_records(
    key: Tensor,
    value: Tensor,
    S: Tensor,
    scheme: KvScheme,
    keys: Tensor,
    values: Tensor,
    start: int | Tensor = 0,
) -> None:
    """Write what `quantize_records` returns into keys and values
    [B, Hkv, capacity, R], from token `start` on.

    keys and values are uint8 with contiguous records; those of a head may lie apart (rows of 16 · n
    bytes load fastest), keys' and values' alike. A tensor `start` [B], integers on the device, has
    a place for each row of the batch; it is trusted to leave room for T tokens, while an int is
    checked. ValueError as `quantize_records`.
    """
    check_states(key, value, S)
    check_head(key.shape[3], scheme)
    check_records(keys, values, key, S, scheme)
    where = None
    if isinstance(start, int):
        T, capacity = key.shape[2], keys.shape[2]
        if not 0 <= start <= capacity - T:
            raise ValueError(f"{T} tokens from {start} on do not fit a cache of {capacity} tokens")
        keys, values = keys[:, :, start:], values[:, :, start:]
    else:
        check_rows("start", start, key)
        where = start
    ops.append_records(_rows(key), _rows(value), S, keys, values, where, *_facts(scheme))


def attend_records(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    S: Tensor,
    scheme: KvScheme,
    scaling: float,
    *,
    causal: bool = True,
    window: int | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention of query [B, H, T, d] to the INT4 cache → [B, H, T, d] in query's dtype,
    heads of a token side by side.

    keys and values: records uint8 [B, Hkv, L, R] of K·S and V, as `append_records` takes them; S
    float32 [Hkv, d]; scaling multiplies the scores. The queries are the last T tokens: of all L, or
    of the first lengths[b] (integers [B] on the device, at most L), which leaves out memory that
    holds no tokens yet. Each sees tokens up to itself if `causal`, the last `window` of those, and
    where `mask`, bool [B or 1, 1, T or 1, L], is True; if it sees none, the result is 0.

    Q/S is rounded to E4M3 per token and head; probabilities are rounded as
    `attention_reference.attend` does with `whole_top`; the rest is float32 and exact, but for this:
    a kernel for many queries reads values in float16 over a power of two (exact where the scale is
    symmetric and within 2⁻¹⁴ of the head's largest), one for few rounds probability times scale to
    11 bits, and FP8 tensor cores add the products of a query and a key with 14 bits.
    ValueError for wrong shapes, dtypes or devices, or a layout that no
    kernel knows (`scheme_fits`).
    """
    check_query(query, S)
    check_head(query.shape[3], scheme)
    check_records(keys, values, query, S, scheme)
    facts = (scaling, causal, *_view(query, keys.shape[2], window, mask, lengths))
    out: Tensor = ops.attend_records(_rows(query), keys, values, S, *_facts(scheme), *facts)
    return out


def quantize_fp8(key: Tensor, value: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """key and value [B, Hkv, L, d], S [Hkv, d] → what `attend_fp8` takes: K·S and
    V in E4M3, with their scales.

    Keys have a scale per token and head [B, Hkv, L], values one per head [B, Hkv]; tokens of a
    value's channel lie side by side, as FP8 tensor cores want the right factor.
    """
    k = key.float() * S[:, None]
    key_scale = (k.abs().amax(dim=-1) / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    value_scale = (value.float().abs().amax(dim=(2, 3)) / E4M3_MAX).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    keys = e4m3(k / key_scale[..., None]).to(torch.float8_e4m3fn)
    B, H, L, d = value.shape
    values = torch.zeros(
        B, H, d, math.ceil(L / 16) * 16, dtype=torch.float8_e4m3fn, device=value.device
    )
    values[..., :L] = e4m3(value.float() / value_scale[..., None, None]).to(values.dtype).mT
    return keys, key_scale, values.mT[:, :, :L], value_scale


def attend_fp8(
    query: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    values: Tensor,
    value_scale: Tensor,
    S: Tensor,
    scaling: float,
    *,
    causal: bool = True,
    window: int | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Attention to keys and values in E4M3, all three products in FP8; the rest
    is as `attend_records` says.

    keys float8_e4m3fn [B, Hkv, L, d], contiguous, times key_scale float32 [B, Hkv, L]; values
    [B, Hkv, L, d] of any strides, times value_scale float32 [B, Hkv]: what `quantize_fp8` returns.
    """
    check_query(query, S)
    check_head(query.shape[3])
    check_fp8(query, keys, key_scale, values, value_scale, S)
    facts = (scaling, causal, *_view(query, keys.shape[2], window, mask, lengths))
    out: Tensor = ops.attend_fp8(_rows(query), keys, key_scale, values, value_scale, S, *facts)
    return out


def _facts(scheme: KvScheme) -> tuple[int, bool, str]:
    return scheme.group_size, scheme.symmetric, scheme.scale_dtype


def _view(
    query: Tensor, tokens: int, window: int | None, mask: Tensor | None, lengths: Tensor | None
) -> tuple[int | None, Tensor | None, Tensor | None]:
    if window is not None and window < 1:
        raise ValueError(f"window {window} is not positive")
    if lengths is not None:
        check_rows("lengths", lengths, query)
    return window, checked_mask(mask, query, tokens), lengths


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
