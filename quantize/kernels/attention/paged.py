"""Attention on an INT4 KV cache in pages, as serving engines hold it.

A page holds `size` tokens of every key head, uint8 [Hkv, size, C]: a token's records of K·S and of V
(`quantize/formats/kv4.py`) stand in its first bytes, one after the other. A block table lists the pages of a
sequence in their order; token t of it is in place t % size of page table[t // size].

Plain torch; results are those of `quantize.kernels.attention.reference` on the same tokens side by side.
"""

from __future__ import annotations

from torch import Tensor

from quantize.formats.fp8 import quantize_activations
from quantize.formats.kv4 import KvNumerics, KvScheme, quantize
from quantize.kernels.attention.reference import attend, over_scale, read_reference, visible


def store_pages(
    key: Tensor, value: Tensor, S: Tensor, scheme: KvScheme, pages: Tensor, slots: Tensor
) -> None:
    """Write records of key·S and value [T, Hkv, d] into pages uint8 [P, Hkv, size, C].

    slots: integers [at most T], page · size + place of each token; a negative one is not stored.
    """
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
) -> Tensor:
    """Causal attention of the last tokens of B sequences, their queries [T, H, d] one after the other, into
    out [T, H, d]; returns it.

    table: pages of each sequence, integers [B, most]; starts: first query of each, [B + 1]; lengths: tokens
    of each in the cache, its queries' own included, [B]. A query sees the last `window` tokens alone.
    """
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
        mixed = attend(q, k, v, mask, scaling, numerics.fp8_probabilities)
        out[part] = mixed[0].transpose(0, 1).to(out.dtype)
    return out
