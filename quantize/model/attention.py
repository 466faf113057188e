"""Attention over an INT4 KV cache with FP8 queries and probabilities: by a
kernel, or emulated in plain torch.

FireQ (arXiv 2505.20839): keys and values are rounded to INT4 per token and head as they enter the
cache, queries and probabilities to E4M3, products accumulate in float32. Keys are stored as K·S and
queries multiplied as Q/S, with the post-RoPE scale S of the checkpoint. Where it has them, shifts and
rotations of keys and values are done before they are rounded (`quantize.kernels.attention.affine`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantize.formats.fp8 import quantize_activations
from quantize.formats.kv4 import KvNumerics as KvNumerics
from quantize.formats.kv4 import KvScheme, fake_quantize
from quantize.kernels.attention.affine import Affine
from quantize.kernels.attention.api import attend_records, quantize_records, takes
from quantize.kernels.attention.reference import attend, over_scale, read_reference
from quantize.model.transformers_api import register_attention

ATTENTION = "pq"
"""Name of the attention implementation: SDPA, except in modules that carry a
`KvAttention` named `kv`."""


class KvAttention(nn.Module):
    """What an attention module needs to work on an INT4 KV cache; attached to
    it as its submodule `kv`."""

    scale: Tensor
    """[Hkv, d] float32: S. Stored keys are K·S, queries Q/S; ones where no channel is treated.

    Where numerics are affine there are beside it the float32 buffers `key_shift` and `value_shift`
    [Hkv, d], zeros, and `key_rotation` and `value_rotation` [Hkv, d, d], identities at first.
    """

    def __init__(self, numerics: KvNumerics, n_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.numerics = numerics
        numerics.scheme.group(head_dim)  # refuses what the cache cannot hold
        for name, shape in numerics.tensors(n_kv_heads, head_dim).items():
            self.register_buffer(name.removeprefix("kv."), _neutral(name, shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KvAttention:
        for name, tensor in self.named_buffers():
            moved = fn(tensor)
            # A cast of the model must not round S: keys that were stored with it
            # would no longer fit the queries.
            setattr(self, name, moved if moved.dtype == torch.float32 else tensor.to(moved.device))
        return self

    def is_like(self, other: KvAttention) -> bool:
        """Whether what the one stored the other reads: the same rounding, S, shifts and rotations."""
        held = dict(other.named_buffers())
        return (
            self.scheme == other.scheme
            and {*held} == {n for n, _ in self.named_buffers()}
            and all(
                mine.shape == held[name].shape and torch.equal(mine.to(held[name]), held[name])
                for name, mine in self.named_buffers()
            )
        )

    def affine(self, device: torch.device) -> Affine | None:
        """The maps of keys and values on `device`; None where there is only S."""
        if not self.numerics.affine:
            return None
        tensors = {name: held.to(device, torch.float32) for name, held in self.named_buffers()}
        return Affine.of(tensors["scale"], tensors)

    def entering(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """key and value [B, Hkv, T, d] as they are to be rounded, but for a scale [Hkv, d] of keys;
        and that scale."""
        S = self.scale.to(key.device, torch.float32)
        if (maps := self.affine(key.device)) is None:
            return key, value, S
        return maps.keys(key), maps.values(value), torch.ones_like(S)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """query [B, H, T, d], key and value [B, Hkv, S, d], mask bool or additive →
        [B, H, T, d] in query's dtype.

        A key with the attribute `pq_stored` comes out of the INT4 cache: it and its
        value are rounded already. So do keys and values that are records, uint8
        [B, Hkv, S, R], which is what kernels read.
        """
        stored = key.dtype == torch.uint8 or getattr(key, "pq_stored", False)
        S, maps = self.scale.float(), self.affine(query.device)
        q = query
        if maps is not None:
            q, S = maps.queries(query), torch.ones_like(S)
        if not stored:
            key, value, _ = self.entering(key, value)
        mixed = self._attend(q, key, value, S, mask, scaling, stored)
        return mixed if maps is None else maps.output(mixed, query.dtype)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        S: Tensor,
        mask: Tensor | None,
        scaling: float,
        stored: bool,
    ) -> Tensor:
        if self._has_kernel(query, mask):
            if not stored:
                key, value = quantize_records(key, value, S, self.scheme)
            if key.dtype == torch.uint8:
                return attend_records(
                    query, key, value, S, self.scheme, scaling, causal=mask is None, mask=mask
                )
        q = self.rounded_query(query, S)
        if key.dtype == torch.uint8:
            k, v = (
                read_reference(records, self.scheme, query.shape[3]) for records in (key, value)
            )
        elif stored:
            k, v = key.float(), value.float()
        else:
            k, v = (
                fake_quantize(key.float() * S[:, None], self.scheme),
                fake_quantize(value.float(), self.scheme),
            )
        return attend(q, k, v, mask, scaling, self.numerics.fp8_probabilities).to(query.dtype)

    def _has_kernel(self, query: Tensor, mask: Tensor | None) -> bool:
        learns = torch.is_grad_enabled() and query.requires_grad
        plain = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
        fp8 = self.numerics.fp8_query and self.numerics.fp8_probabilities
        return fp8 and plain and not learns and takes(query, self.scheme)

    @property
    def scheme(self) -> KvScheme:
        """Layout of the cache."""
        return self.numerics.scheme

    def rounded_query(self, query: Tensor, S: Tensor) -> Tensor:
        """Q/S, rounded to E4M3 per token and head; [B, H, T, d] float32. S: [Hkv, d]."""
        q = over_scale(query, S)
        return quantize_activations(q) if self.numerics.fp8_query else q


def _neutral(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that name that changes nothing."""
    if name.endswith("rotation"):
        return torch.eye(shape[-1], dtype=torch.float32).repeat(shape[0], 1, 1)
    return torch.full(shape, float(name.endswith("scale")), dtype=torch.float32)


Watch = Callable[[nn.Module, Tensor, Tensor, Tensor, Mapping[str, Any]], None]
"""Told of a call of attention: module, query, key, value, and what else changes what is computed."""

_watches: list[Watch] = []


@contextmanager
def watch_attention(watch: Watch) -> Iterator[None]:
    """Tell `watch` of every call of attention meanwhile."""
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


def attend_by_kv(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    options: Mapping[str, Any],
) -> Tensor | None:
    """What `module.kv` gives (`KvAttention`); plain attention where it is asked for what SDPA cannot;
    None leaves it to SDPA.

    options: of `ATTENTION_OPTIONS`, those that are asked for.
    """
    for watch in _watches:
        watch(module, query, key, value, options)
    kv = getattr(module, "kv", None)
    if kv is not None:
        mixed: Tensor = kv(query, key, value, mask, scaling)
        return mixed
    return attend_plainly(query, key, value, mask, scaling, **options) if options else None


def attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention with capped scores c·tanh(s/c) (Gemma 2, arXiv 2408.00118) and sinks [H], scores of a
    key without a value (gpt-oss, arXiv 2508.10925); [B, H, T, d].

    query [B, H, T, d], key and value [B, Hkv, S, d]; mask bool or additive, None: causal.
    """
    repeated = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(repeated, 1), value.repeat_interleave(repeated, 1)
    scores = (query @ k.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        T, S = scores.shape[2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(scores).masked_fill(~mask, float("-inf"))
    scores = scores + mask
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    shares = scores.softmax(-1)[..., : k.shape[2]]
    return shares.to(v.dtype) @ v


register_attention(ATTENTION, attend_by_kv)
