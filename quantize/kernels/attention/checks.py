"""What goes into attention kernels: ValueError for shapes, dtypes, layouts and devices
that they were not made for."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.formats.kv4 import KvScheme
from quantize.kernels.device import DTYPES

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
"""Channels of the heads that kernels are tested with."""

_INTEGERS = (torch.int32, torch.int64)


def scheme_fits(scheme: KvScheme, head_dim: int) -> bool:
    """Whether the kernels know the layout: a head of `HEAD_DIMS`, one or two groups of channels."""
    return head_dim in HEAD_DIMS and head_dim // scheme.group(head_dim) <= 2


def check_head(head_dim: int, scheme: KvScheme | None = None) -> None:
    """The head is one of `HEAD_DIMS`, and its layout fits."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"no kernel knows heads of {head_dim} channels, only of "
            f"{', '.join(map(str, HEAD_DIMS))}"
        )
    if scheme is not None and not scheme_fits(scheme, head_dim):
        groups = head_dim // scheme.group(head_dim)
        raise ValueError(
            f"no kernel knows heads of {groups} groups of {scheme.group_size} channels, only of 1 "
            "or 2"
        )


def check_states(key: Tensor, value: Tensor, S: Tensor) -> None:
    """key and value [B, Hkv, T, d], S [Hkv, d]."""
    if key.ndim != 4 or key.dtype not in DTYPES:
        found = f"{key.dtype} {tuple(key.shape)}"
        raise ValueError(f"key is {found}, expected [B, H, T, d] in bfloat16, float16 or float32")
    _check("value", value, key.dtype, tuple(key.shape), key.device)
    _check("S", S, torch.float32, (key.shape[1], key.shape[3]), key.device, contiguous=True)


def check_query(query: Tensor, S: Tensor) -> None:
    """query [B, H, T, d], S [Hkv, d], H a multiple of Hkv."""
    if query.ndim != 4 or query.dtype not in DTYPES:
        found = f"{query.dtype} {tuple(query.shape)}"
        raise ValueError(f"query is {found}, expected [B, H, T, d] in bfloat16, float16 or float32")
    _check("S", S, torch.float32, (len(S), query.shape[3]), query.device, contiguous=True)
    if not len(S) or query.shape[1] % len(S):
        raise ValueError(f"{query.shape[1]} query heads cannot share {len(S)} key heads")


def check_records(keys: Tensor, values: Tensor, x: Tensor, S: Tensor, scheme: KvScheme) -> None:
    """Records [B, Hkv, L, R] of heads like x's [B, ·, ·, d], keys and values in the same layout."""
    R = scheme.record_bytes(x.shape[3])
    for name, records in (("keys", keys), ("values", values)):
        tokens = keys.shape[2] if keys.ndim == 4 else 0
        _check(name, records, torch.uint8, (len(x), len(S), tokens, R), x.device)
        if records.stride(3) != 1:
            raise ValueError(f"bytes of a record of {name} must be contiguous")
    if keys.stride(2) != values.stride(2):
        raise ValueError(
            f"records of keys are {keys.stride(2)} bytes apart, those of values {values.stride(2)}"
        )


def check_fp8(
    query: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor, S: Tensor
) -> None:
    """E4M3 keys and values [B, Hkv, L, d] with scales [B, Hkv, L] and [B, Hkv]."""
    shape = (len(query), len(S), keys.shape[2] if keys.ndim == 4 else 0, query.shape[3])
    _check("keys", keys, torch.float8_e4m3fn, shape, query.device, contiguous=True)
    _check("key_scale", key_scale, torch.float32, shape[:3], query.device, contiguous=True)
    _check("values", values, torch.float8_e4m3fn, shape, query.device)
    _check("value_scale", value_scale, torch.float32, shape[:2], query.device, contiguous=True)


def check_rows(name: str, rows: Tensor, x: Tensor) -> None:
    """An integer for each row of the batch of x."""
    if tuple(rows.shape) != (len(x),) or rows.device != x.device or rows.dtype not in _INTEGERS:
        found = f"{rows.dtype} {tuple(rows.shape)} on {rows.device}"
        raise ValueError(f"{name} is {found}, expected {len(x)} integers on {x.device}")
    if not rows.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def checked_mask(mask: Tensor | None, query: Tensor, tokens: int) -> Tensor | None:
    """The mask as bool [B, 1, T, L]."""
    if mask is None:
        return None
    B, _, T, _ = query.shape
    wanted = (B, 1, T, tokens)
    fits = mask.ndim == 4 and all(
        have in (1, want) for have, want in zip(mask.shape, wanted, strict=True)
    )
    if mask.dtype != torch.bool or not fits or mask.device != query.device:
        found = f"{mask.dtype} {tuple(mask.shape)} on {mask.device}"
        raise ValueError(
            f"mask is {found}, expected torch.bool {wanted} on {query.device}, or 1 for an axis"
        )
    return mask.expand(wanted)


def _check(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    contiguous: bool = False,
) -> None:
    if (tensor.dtype, tuple(tensor.shape), tensor.device) != (dtype, shape, device):
        found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} is {found}, expected {dtype} {shape} on {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
