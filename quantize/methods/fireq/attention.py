"""FireQ's attention (arXiv 2505.20839): INT4 KV cache, FP8 queries and probabilities,
pre- and post-RoPE key scales.

Pre-RoPE scales N are equal within a rotation pair, commute with the rotation and are folded into
k_proj and q_proj (where a norm over the head follows, into its weights). Post-RoPE scales S are
multiplied at run time. Every pair gets
one treatment: N, S, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from quantize.block.capture import attention_inputs
from quantize.cost.footprint import FLOAT, BlockSizes
from quantize.errors import ModelError
from quantize.formats.kv4 import KvScheme
from quantize.methods.base import Kind, Stage
from quantize.methods.fireq.kv_affine import chosen
from quantize.methods.fireq.kv_search import (
    BALANCES,
    EXPONENTS,
    MOVES,
    SCORES_AT_ONCE,
    KeyScales,
    Sample,
    aligned,
    aligned_candidates,
    channel_maxima,
    first_of,
    key_balance,
    output_error,
    output_power,
    paper_scales,
    post_candidates,
    powers_of_two,
    pre_candidates,
    rounded_values,
    value_balance,
)
from quantize.model.attention import KvAttention, KvNumerics
from quantize.model.rope import partners
from quantize.pictures import Lines, Picture, place_of

if TYPE_CHECKING:
    from quantize.block.block import Block

# Tokens that scales are tried on. Time grows with them, since each scale is tried on all of them,
# and errors settle long before.
_TOKENS = 2048


class FireqAttention(Stage):
    """INT4 keys and values, FP8 queries and probabilities, and the key and value
    scales that make them fit."""

    kind: ClassVar[Kind] = "cache"
    method: Literal["fireq-attention"] = "fireq-attention"
    group_size: int = Field(default=128, ge=16, le=256)
    """Channels of a head that share a scale; at most a whole head."""
    symmetric: bool = False
    """Symmetric codes −8 … 7, as in the paper; false: 0 … 15 with a zero point, which halves the loss
    for 0.06 bits more a value."""
    scale_dtype: Literal["bfloat16", "e4m3"] = "bfloat16"
    """What the cache stores its scales as."""
    queries: Literal["none", "fp8"] = "fp8"
    """`fp8`: dynamic E4M3 per token and head."""
    probabilities: Literal["none", "fp8"] = "fp8"
    """`fp8`: E4M3 of the softmax numerator × 448."""
    pre: bool = True
    """Whether pairs may get a pre-RoPE scale."""
    post: bool = True
    """Whether pairs may get a post-RoPE scale; `format: compressed-tensors` cannot
    hold it and goes without."""
    values: bool = True
    """Whether value channels are balanced on the v → o edge, too (not in the paper)."""
    affine: bool = True
    """Whether keys are shifted, scaled and rotated after RoPE, and values shifted and rotated, before an
    asymmetric cache rounds them (not in the paper): learned in the place of the search for pre- and
    post-RoPE scales. Where a symmetric cache, a format without post-RoPE scales, or `post: false` or
    `search: false` asks for those, it goes without."""
    search: bool = True
    """Choose per kv head by the attention-output error, never worse than no scale;
    false: the constants below."""
    alpha: float = Field(default=8.0, gt=0, le=1e4)
    """Without search: N brings every pair's largest length to α."""
    beta: float = Field(default=8.0, gt=0, le=1e4)
    """Without search: S brings a treated channel's largest magnitude to β."""
    top_k: int = Field(default=8, ge=0, le=256)
    """Without search: channels per head that S treats, partners not counted."""

    @property
    def numerics(self) -> KvNumerics:
        """How attention rounds."""
        scheme = KvScheme(self.group_size, self.symmetric, self.scale_dtype)
        affine = self.affine and self.search and self.post and not self.symmetric
        return KvNumerics(scheme, self.queries == "fp8", self.probabilities == "fp8", affine)

    def as_json(self, keeps_post_scales: bool = True) -> dict[str, Any]:
        """The `attention` part of a native checkpoint's quantization_config; keeps_post_scales:
        whether the format can hold what is done at run time."""
        return self._numerics(keeps_post_scales).as_json()

    def _numerics(self, keeps_post_scales: bool) -> KvNumerics:
        return replace(self.numerics, affine=self.numerics.affine and keeps_post_scales)

    def room(self, sizes: BlockSizes) -> int:
        """Sampled queries, keys, values and outputs, scaled and rounded ones beside
        them, and some of the scores."""
        width = sizes.hidden * (2 + 2 * sizes.kv_heads / sizes.heads)
        sampled = min(sizes.tokens, -(-self.tokens_read // sizes.window) * sizes.window)
        scores = min(SCORES_AT_ONCE, sizes.heads * sizes.window**2)
        return (
            max(sizes.forward(), int(3 * FLOAT * sampled * width) + 4 * FLOAT * scores)
            + sizes.folding()
        )

    @property
    def tokens_read(self) -> int:
        """The sample that scales are tried on; as much again to fit affine maps to."""
        return 2 * _TOKENS if self.numerics.affine else _TOKENS

    def apply(self, block: Block) -> None:
        """Choose and fold the scales of one block, and let it attend as the
        kernel will from here on."""
        shape, arch, heads = block.shape, block.arch, block.arch.heads
        if arch.no_cache or heads is None:
            block.note(arch.attention or "attention", cache_16bit=arch.no_cache)
            return
        try:
            self.numerics.scheme.group(shape.head_dim)
        except ValueError as err:
            raise ModelError(f"{block.full_name(arch.attention)}: {err}") from None
        samples = [Sample.of(*inputs) for inputs in attention_inputs(block, self.tokens_read)]
        numerics = self._numerics(block.keeps_post_scales)
        if numerics.affine:
            self._apply_affine(block, samples)
            return
        partner = partners(arch.rope, shape.head_dim, heads.rotary_dim).to(block.device)
        gram = _gram(block)
        one = torch.ones(shape.n_kv_heads, shape.head_dim, device=block.device)
        values, chosen = one, KeyScales(one, one)
        # Outliers in the values hide what key scales do, and the other way round: twice.
        for _ in range(2 if self.search else 1):
            values = self._values(block, samples, chosen, gram)
            chosen, error = self._keys(block, samples, partner, values, gram)
        power = float(output_power(samples, gram, shape.n_kv_heads).sum())
        block.note(
            arch.attention,
            kv_error_unscaled=float(output_error(samples, one, one, gram, self.numerics).sum())
            / power,
            kv_error=error / power,
            pre_channels=int((chosen.pre != 1).sum()),
            post_channels=int((chosen.post != 1).sum()),
        )
        self._fold(block, chosen.pre)
        if (values != 1).any():
            block.fold(arch.edge("v_o"), values.flatten())
        kv = KvAttention(numerics, shape.n_kv_heads, shape.head_dim)
        kv.scale.copy_(chosen.post)
        block.attend_with(kv)

    def _apply_affine(self, block: Block, samples: Sequence[Sample]) -> None:
        scaled = self.values and block.find_edge("v_o") is not None
        choice = chosen(samples, _gram(block), self.numerics, self.values, scaled)
        kv = KvAttention(self.numerics, block.shape.n_kv_heads, block.shape.head_dim)
        for name, tensor in vars(choice.maps).items():
            getattr(kv, name).copy_(tensor)
        block.note(
            block.arch.attention,
            kv_error_unscaled=float(choice.before.sum()) / choice.power,
            kv_error=float(choice.after.sum()) / choice.power,
            rotated_heads=int(
                (choice.maps.key_rotation.diagonal(dim1=1, dim2=2) != 1).any(1).sum()
            ),
        )
        if (choice.over != 1).any():
            block.fold(block.arch.edge("v_o"), choice.over.flatten())
        block.attend_with(kv)

    def _keys(
        self, block: Block, samples: Sequence[Sample], partner: Tensor, values: Tensor, gram: Tensor
    ) -> tuple[KeyScales, float]:
        """The key scales of every kv head, and the error that is left with them."""
        channel, pair = channel_maxima(samples, partner)
        post = self.post and block.keeps_post_scales
        heads = block.arch.heads
        pre = self.pre and heads is not None and heads.scores
        shared = block.arch.qk_norm is not None  # one norm weight for all heads
        if shared:
            pair = pair.amax(dim=0, keepdim=True).expand_as(pair)
        one = torch.ones_like(channel)
        rounded = rounded_values(samples, values, self.numerics)
        errors = output_error(samples, one, values, gram, self.numerics, rounded)
        best = KeyScales(one, one)

        def consider(candidate: KeyScales, forced: bool = False) -> None:
            nonlocal best, errors
            scales = _storable(candidate) if shared else candidate
            keys = scales.pre * scales.post
            error = output_error(samples, keys, values, gram, self.numerics, rounded)
            better = (error.sum() < errors.sum()).expand_as(error) if shared else error < errors
            better = torch.ones_like(better) if forced else better
            errors = torch.where(better, error, errors)
            rows = better.to(one.device)[:, None]
            best = KeyScales(
                torch.where(rows, scales.pre, best.pre), torch.where(rows, scales.post, best.post)
            )

        if not self.search:
            alpha, beta = self.alpha if pre else 0.0, self.beta if post else 0.0
            consider(paper_scales(channel, pair, partner, alpha, beta, self.top_k), forced=True)
        if self.search and pre:
            even = key_balance(samples, partner)
            even = even.mean(dim=0, keepdim=True).expand_as(even) if shared else even
            for candidate in (*pre_candidates(pair), KeyScales(even, one)):
                consider(candidate)
        for candidate in (
            post_candidates(channel, pair, partner, best.pre) if self.search and post else ()
        ):
            consider(candidate)
        if self.search and post:
            balanced = key_balance(samples)
            for strength in BALANCES:
                consider(KeyScales(one, balanced**strength))
            for candidate in aligned_candidates(samples, best, self.numerics.scheme):
                consider(candidate)
        return best, float(errors.sum())

    def _values(
        self, block: Block, samples: Sequence[Sample], keys: KeyScales, gram: Tensor
    ) -> Tensor:
        """λ [Hkv, d] on the v → o edge, by the same error."""
        one, key_scale = torch.ones_like(keys.pre), keys.pre * keys.post
        if not self.values or not self.search or block.find_edge("v_o") is None:
            return one
        largest = torch.stack([s.v.abs().amax(dim=(0, 2)) for s in samples]).amax(dim=0)
        largest = largest.clamp_min(
            1e-6 * largest.amax(dim=1, keepdim=True) + torch.finfo(torch.float32).tiny
        )
        typical = largest.log().mean(dim=1, keepdim=True).exp()
        best, errors = one, output_error(samples, key_scale, one, gram, self.numerics)
        before = float(errors.sum())
        evened = [(largest / typical) ** exponent for exponent in EXPONENTS[1:]]
        for scale in (*evened, value_balance(samples, gram)):
            error = output_error(samples, key_scale, scale, gram, self.numerics)
            best = torch.where((error < errors).to(one.device)[:, None], scale, best)
            errors = torch.minimum(errors, error)
        if (first := first_of([s.v for s in samples])) is not None:
            free = 1 / best
            for move in MOVES:
                scale = 1 / aligned(first, free, self.numerics.scheme, move)
                error = output_error(samples, key_scale, scale, gram, self.numerics)
                best = torch.where((error < errors).to(one.device)[:, None], scale, best)
                errors = torch.minimum(errors, error)
        block.note(block.arch.attention, value_gain=float(errors.sum()) / before if before else 1.0)
        return best

    def _fold(self, block: Block, pre: Tensor) -> None:
        """Fold N: keys ×N, queries ÷N."""
        arch, shape = block.arch, block.shape
        if (pre == 1).all():
            return
        if arch.qk_norm is not None:
            query, key = (block.module.get_parameter(f"{name}.weight") for name in arch.qk_norm)
            added = arch.qk_offset
            key.data = (key + added) * pre[0].to(key.dtype) - added
            query.data = (query + added) / pre[0].to(query.dtype) - added
            return
        assert arch.heads is not None
        assert arch.heads.key is not None
        assert arch.heads.query is not None
        block.scale_rows(arch.heads.key, pre.flatten())
        queries = 1 / pre.repeat_interleave(shape.n_heads // shape.n_kv_heads, dim=0)
        block.scale_rows(arch.heads.query, queries.flatten())

    def pictures(self, layers: Mapping[str, Mapping[str, Any]]) -> tuple[Picture, ...]:
        """Error of the attention output by block, with and without scales."""
        found = {
            place[0]: facts
            for name, facts in layers.items()
            if "kv_error" in facts and (place := place_of(name))
        }
        if not found:
            return ()
        blocks = sorted(found)
        series = {
            "no scales": [found[b].get("kv_error_unscaled") for b in blocks],
            "key scales": [found[b]["kv_error"] for b in blocks],
        }
        caption = (
            "Squared error of attention behind o_proj, relative to its output, on calibration "
            "text; INT4 keys and values, FP8 queries and probabilities."
        )
        return (
            Lines(
                "Attention on the INT4 cache",
                caption,
                blocks,
                series,
                "block",
                "relative error",
                log_y=True,
            ),
        )


def _gram(block: Block) -> Tensor:
    """Wᵀ W [H, d, d] of o_proj's columns for each query head; the identity where no linear reads
    attention's output alone."""
    name, size = block.arch.find_role("o"), block.shape.n_heads * block.shape.head_dim
    if name is None or block.linear(name).in_features != size:
        eye = torch.eye(block.shape.head_dim, device=block.device)
        return eye.expand(block.shape.n_heads, -1, -1)
    weight = block.linear(name).weight.float()
    heads = weight.view(weight.shape[0], block.shape.n_heads, block.shape.head_dim).transpose(0, 1)
    return heads.transpose(1, 2) @ heads


def _storable(scales: KeyScales) -> KeyScales:
    """N where it goes into norm weights, which are stored in 16 bits and shared by all heads.

    It becomes a power of two, and 1 on pairs that any head treats with S:
    every pair gets one treatment.
    """
    treated = (scales.post != 1).any(dim=0)
    pre = torch.where(treated, 1, powers_of_two(scales.pre[:1]))
    return KeyScales(pre.expand_as(scales.pre).contiguous(), scales.post)
