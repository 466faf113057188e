"""Attention as operators that torch.compile and CUDA graphs take whole;
`api.py` checks what goes in."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from quantize.formats.kv4 import KvScheme
from quantize.kernels.attention.reference import (
    attend_codes_reference,
    attend_records_reference,
    store_reference,
)
from quantize.kernels.device import has_fp8_kernel

_SCHEME = "int group_size, bool symmetric, str scale_dtype"
_VIEW = "float scaling, bool causal, SymInt? window, Tensor? mask, Tensor? lengths"


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
    return torch.empty(
        *x.shape[:3], scheme.record_bytes(x.shape[3]), dtype=torch.uint8, device=x.device
    )


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
    return out.copy_(attend_records_reference(query, keys, values, S, scaling, scheme, view))


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
    codes = (keys, key_scale[:, :, None], values, value_scale)
    if not has_fp8_kernel(query):
        return out.copy_(attend_codes_reference(query, *codes, S, scaling, view))
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        _launch().attend_codes(query, *codes, S, out, scaling, view)
    return out


@attend_fp8.register_fake
def _(query: Tensor, *arguments: Any) -> Tensor:
    return _out_like(query)


def _out_like(query: Tensor) -> Tensor:
    # Heads of a token lie side by side, as the projection that follows reads them.
    B, H, T, d = query.shape
    return query.new_empty(B, T, H, d).transpose(1, 2)
