"""Attention as operators that torch.compile and CUDA graphs take whole; `attention.py` checks what goes in."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from quantize.formats.kv4 import KvScheme
from quantize.kernels.attention.reference import View, attend_reference, read_reference, store_reference, visible
from quantize.kernels.bitvec.api import has_kernel

_SCHEME = "int group_size, bool symmetric, str scale_dtype"
_VIEW = "float scaling, bool causal, SymInt? window, Tensor? mask, Tensor? lengths"


@functools.cache
def _knows_e4m3(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def has_fp8_kernel(x: Tensor) -> bool:
    """Whether a Triton kernel with E4M3 numbers can take x: as `has_kernel`, on Ada, Hopper or newer devices."""
    return has_kernel(x) and (not x.is_cuda or _knows_e4m3(x.device))


def _launch() -> Any:
    # Needs Triton, which importing this module does not.
    return importlib.import_module("quantize.kernels.attention.launch")


@torch.library.custom_op(
    "pq::quantize_records",
    mutates_args=(),
    schema=f"(Tensor key, Tensor value, Tensor S, {_SCHEME}) -> (Tensor, Tensor)",
)
def quantize_records(
    key: Tensor, value: Tensor, S: Tensor, group_size: int, symmetric: bool, scale_dtype: Any
) -> tuple[Tensor, Tensor]:
    """`attention.quantize_records`, the scheme in its parts."""
    scheme = KvScheme(group_size, symmetric, scale_dtype)
    keys, values = _records_like(key, scheme), _records_like(key, scheme)
    if not key.numel():
        return keys, values
    if not has_fp8_kernel(key):
        return store_reference(key, value, S, scheme)
    with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
        _launch().store(key, value, S, keys, values, None, scheme)
    return keys, values


@quantize_records.register_fake
def _(
    key: Tensor, value: Tensor, S: Tensor, group_size: int, symmetric: bool, scale_dtype: Any
) -> tuple[Tensor, Tensor]:
    scheme = KvScheme(group_size, symmetric, scale_dtype)
    return _records_like(key, scheme), _records_like(key, scheme)


def _records_like(x: Tensor, scheme: KvScheme) -> Tensor:
    return torch.empty(*x.shape[:3], scheme.record_bytes(x.shape[3]), dtype=torch.uint8, device=x.device)


@torch.library.custom_op(
    "pq::append_records",
    mutates_args=("keys", "values"),
    schema=f"(Tensor key, Tensor value, Tensor S, Tensor(a!) keys, Tensor(b!) values, Tensor? start, {_SCHEME}) -> ()",
)
def append_records(
    key: Tensor,
    value: Tensor,
    S: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor | None,
    group_size: int,
    symmetric: bool,
    scale_dtype: Any,
) -> None:
    """`attention.append_records`, the scheme in its parts."""
    scheme = KvScheme(group_size, symmetric, scale_dtype)
    if not key.numel():
        return
    if has_fp8_kernel(key):
        with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
            _launch().store(key, value, S, keys, values, start, scheme)
        return
    B, _, T, _ = key.shape
    first = torch.zeros(B, dtype=torch.long, device=key.device) if start is None else start.long()
    place = first[:, None] + torch.arange(T, device=key.device)
    row = torch.arange(B, device=key.device)[:, None]
    for stored, new in zip((keys, values), store_reference(key, value, S, scheme), strict=True):
        stored.transpose(1, 2)[row, place] = new.transpose(1, 2)


@append_records.register_fake
def _(*arguments: Any) -> None:
    return None


@torch.library.custom_op(
    "pq::attend_records",
    mutates_args=(),
    schema=f"(Tensor query, Tensor keys, Tensor values, Tensor S, {_SCHEME}, {_VIEW}) -> Tensor",
)
def attend_records(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    S: Tensor,
    group_size: int,
    symmetric: bool,
    scale_dtype: Any,
    scaling: float,
    causal: bool,
    window: int | None,
    mask: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """`attention.attend_records`, the scheme in its parts."""
    scheme = KvScheme(group_size, symmetric, scale_dtype)
    out, view = _out_like(query), (causal, window, mask, lengths)
    if not query.numel() or not keys.numel():
        return out.zero_()
    if has_fp8_kernel(query):
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            _launch().attend_records(query, keys, values, S, out, scaling, scheme, view)
        return out
    k, v = (read_reference(records, scheme, query.shape[3]) for records in (keys, values))
    return _by_reference(query, k, v, S, out, scaling, view)


@attend_records.register_fake
def _(query: Tensor, *arguments: Any) -> Tensor:
    return _out_like(query)


@torch.library.custom_op(
    "pq::attend_fp8",
    mutates_args=(),
    schema=f"(Tensor query, Tensor keys, Tensor key_scale, Tensor values, Tensor value_scale, Tensor S, {_VIEW})"
    " -> Tensor",
)
def attend_fp8(
    query: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    values: Tensor,
    value_scale: Tensor,
    S: Tensor,
    scaling: float,
    causal: bool,
    window: int | None,
    mask: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """`attention.attend_fp8`."""
    out, view = _out_like(query), (causal, window, mask, lengths)
    if not query.numel() or not keys.numel():
        return out.zero_()
    if has_fp8_kernel(query):
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            _launch().attend_codes(query, keys, key_scale[:, :, None], values, value_scale, S, out, scaling, view)
        return out
    k, v = keys.float() * key_scale[..., None], values.float() * value_scale[..., None, None]
    return _by_reference(query, k, v, S, out, scaling, view)


@attend_fp8.register_fake
def _(query: Tensor, *arguments: Any) -> Tensor:
    return _out_like(query)


def _out_like(query: Tensor) -> Tensor:
    # Heads of a token lie side by side, as the projection that follows reads them.
    B, H, T, d = query.shape
    return query.new_empty(B, T, H, d).transpose(1, 2)


def _by_reference(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor,
    out: Tensor,
    scaling: float,
    view: View,
) -> Tensor:
    T, L, device = query.shape[2], k.shape[2], query.device
    # What lies beyond a sequence holds anything, and 0 · NaN would show.
    held = visible(1, L, (False, None, None, view[3]), device).mT
    k, v = k.masked_fill(~held, 0), v.masked_fill(~held, 0)
    return out.copy_(attend_reference(query, k, v, S, scaling, visible(T, L, view, device)))
