"""Attention on an INT4 KV cache in pages, as serving engines hold it.

A page holds `size` tokens of every key head, uint8 [Hkv, size, C]: a token's records of K·S and of V
(`quantize/formats/kv4.py`) stand in its first bytes, one after the other. A block table lists the pages of a
sequence in their order; token t of it is in place t % size of page table[t // size].

Triton computes it on NVIDIA devices that know E4M3, plain torch elsewhere; results are those of
`quantize.kernels.attention.reference` on the same tokens side by side.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from quantize.formats.fp8 import quantize_activations
from quantize.formats.kv4 import KvNumerics, KvScheme, quantize
from quantize.kernels.attention.checks import scheme_fits
from quantize.kernels.attention.reference import attend, over_scale, read_reference, visible
from quantize.kernels.device import has_fp8_kernel


def store_pages(
    key: Tensor, value: Tensor, S: Tensor, scheme: KvScheme, pages: Tensor, slots: Tensor
) -> None:
    """Write records of key·S and value [T, Hkv, d] into pages uint8 [P, Hkv, size, C].

    slots: integers [at most T], page · size + place of each token; a negative one is not stored.
    """
    if not len(slots):
        return
    if scheme_fits(scheme, key.shape[2]) and has_fp8_kernel(key):
        with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
            _launch().store(key, value, S, scheme, pages, slots)
        return
    held = slots >= 0
    T, size, R = len(slots), pages.shape[2], scheme.record_bytes(key.shape[2])
    page, place = slots[held] // size, slots[held] % size
    pages[page, :, place, :R] = quantize(key[:T][held].float() * S, scheme).records()
    pages[page, :, place, R : 2 * R] = quantize(value[:T][held].float(), scheme).records()


def attend_pages(
    query: Tensor,
    pages: Tensor,
    S: Tensor,
    numerics: KvNumerics,
    scaling: float,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    window: int | None = None,
    most_new: int | None = None,
    most_tokens: int | None = None,
) -> Tensor:
    """Causal attention of the last tokens of B sequences, their queries [T, H, d] one after the other, into
    out [T, H, d]; returns it.

    table: pages of each sequence, integers [B, most]; starts: first query of each, [B + 1]; lengths: tokens
    of each in the cache, its queries' own included, [B]. A query sees the last `window` tokens alone.
    most_new and most_tokens: bounds of new and of all tokens of a sequence (default: all queries, and all that
    the table holds), by which launches are sized without waiting for the device. A kernel takes probabilities
    against a whole power of two (`reference.attend`).
    """
    if not query.numel():
        return out
    if _has_kernel(query, numerics):
        bounds = (most_new or len(query), most_tokens or table.shape[1] * pages.shape[2])
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            _launch().attend(
                query,
                pages,
                S,
                numerics.scheme,
                scaling,
                table,
                starts,
                lengths,
                out,
                window,
                *bounds,
            )
        return out
    return attend_pages_reference(
        query, pages, S, numerics, scaling, table, starts, lengths, out, window=window
    )


def _has_kernel(query: Tensor, numerics: KvNumerics) -> bool:
    fp8 = numerics.fp8_query and numerics.fp8_probabilities
    return fp8 and scheme_fits(numerics.scheme, query.shape[2]) and has_fp8_kernel(query)


def _launch() -> Any:
    # Needs Triton, which importing this module does not.
    return importlib.import_module("quantize.kernels.attention.paged_launch")


def attend_pages_reference(
    query: Tensor,
    pages: Tensor,
    S: Tensor,
    numerics: KvNumerics,
    scaling: float,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    window: int | None = None,
    whole_top: bool = False,
) -> Tensor:
    """`attend_pages` in plain torch; `whole_top`: probabilities as the kernel takes them."""
    size, d, scheme = pages.shape[2], query.shape[2], numerics.scheme
    R, first = scheme.record_bytes(d), starts.tolist()
    for b, L in enumerate(lengths.tolist()):
        part = slice(first[b], first[b + 1])
        T = part.stop - part.start
        if T <= 0:
            continue
        # [Hkv, L, C]: the sequence's tokens side by side
        cells = pages[table[b, : -(-L // size)].long()].transpose(0, 1).flatten(1, 2)[:, :L]
        k, v = (read_reference(cells[..., at : at + R], scheme, d)[None] for at in (0, R))
        q = over_scale(query[part].transpose(0, 1)[None], S)
        if numerics.fp8_query:
            q = quantize_activations(q)
        view = (True, window, None, None)
        mask = None if window is None or window >= L else visible(T, L, view, q.device)
        mixed = attend(q, k, v, mask, scaling, numerics.fp8_probabilities, whole_top=whole_top)
        out[part] = mixed[0].transpose(0, 1).to(out.dtype)
    return out
