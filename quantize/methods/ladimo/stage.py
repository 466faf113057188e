"""LaDiMo: a dense FFN becomes a mixture of experts by layer-wise
distillation (arXiv 2408.04278)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from quantize.block.capture import inputs_of
from quantize.block.teacher import keep_parent, parent_outputs
from quantize.cost.footprint import FLOAT, BlockSizes
from quantize.cost.peak import measure
from quantize.errors import ModelError
from quantize.files.memo import digest
from quantize.methods.base import Kind, Stage
from quantize.methods.ladimo.budget import COUNTED, Budget, ffn_neurons, unit_of
from quantize.methods.ladimo.container import (
    BIASED,
    container,
    container_config,
    empty_moe,
    expert_linears,
    fits_stock,
    is_of_experts,
    stock_misfit,
)
from quantize.methods.ladimo.distill import Training
from quantize.methods.ladimo.lesson import Lesson, Outlet
from quantize.methods.ladimo.pictures import pictures
from quantize.methods.ladimo.search import Searcher
from quantize.methods.ladimo.split import Construction, Layout
from quantize.methods.ladimo.teach import Teacher, Teaching
from quantize.methods.ladimo.trial import dense_ffn
from quantize.model.dense_ffn import dense_ffn_of
from quantize.model.moe import MoeFfn, policy_from_json
from quantize.pictures import Picture, place_of

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.block.view import ModelView
    from quantize.model.arch import Architecture

log = logging.getLogger(__name__)

# Of all FFNs: where more goes, teaching repairs little of it (three quarters of those of Gemma 3
# 270M cost a KLD of 1.8).
_MUCH = 0.5


class Ladimo(Stage):
    """Dense FFNs of chosen layers become a shared expert and routed ones,
    taught the dense FFN's outputs.

    Which layers, and how many experts a token visits in each, is searched end to end
    unless `mean_experts` says it.
    """

    kind: ClassVar[Kind] = "restructure"
    once: ClassVar[bool] = True
    method: Literal["ladimo"] = "ladimo"
    activated_reduction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the activated parameters to save: weights of all blocks, the final norm and the head
    count, the embedding table does not."""
    tokens: int = Field(default=100_000, ge=64)
    """Calibration tokens to learn from, at most."""
    shared: int | None = Field(default=None, ge=1)
    """Hidden neurons of the shared expert; null: derived from the reduction."""
    experts: int | None = Field(default=None, ge=2)
    """Routed experts, which divide the other neurons; null: derived."""
    mean_experts: float | tuple[float | None, ...] | None = None
    """Mean number of routed experts a token visits: one number for all blocks, or a list of one for
    every block with null where its FFN stays dense. null instead: searched."""
    construction: Construction = "clustered"
    """`clustered`: neurons of large contribution are shared, the others grouped by the tokens they
    work on; `contiguous`: neurons in their order, as published; `random`."""
    policy: Literal["adaptive", "top-k"] = "adaptive"
    """`adaptive`: in every layer the better of a fixed number of experts and a threshold on the
    routing scores, under which tokens visit more or fewer; `top-k`: one number in all converted
    layers, which stock loaders can hold, the nearest to `mean_experts` where that is given."""
    teaching: Teaching = "distill"
    """`distill`: AdamW on all weights of experts and router; `least-squares`: the down projections
    alone, in closed form; `none`."""
    aim: Literal["parent", "layer"] = "parent"
    """`parent`: reproduce the parent's hidden states from the converted model's; `layer`: the dense
    FFN's outputs for the same inputs, as published."""
    steps: int = Field(default=300, ge=1)
    """Steps of AdamW for a layer, at most."""
    passes: float = Field(default=8.0, gt=0)
    """How often a token is trained on, at most: fewer steps where there are few tokens, of which
    more would be learnt by heart."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Tokens of a step."""
    learning_rate: float = Field(default=0.025, gt=0)
    """In units of the root mean square of the matrix that is changed."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Seed of splits and batches."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.shared is None) != (self.experts is None):
            raise ValueError("shared and experts: give both or neither")
        return self

    @property
    def needs_plan(self) -> bool:
        """Sizes and layers depend on the whole model."""
        return True

    @property
    def needs_parent(self) -> bool:
        """Aiming at the parent takes its hidden states along."""
        return self.aim == "parent"

    @property
    def native_field(self) -> str | None:
        """No other format has thresholds."""
        return "policy" if self.policy == "adaptive" else None

    def needs_native(self, parent: Mapping[str, Any]) -> str | None:
        """Models without a stock container."""
        why = stock_misfit(parent)
        return None if why is None else f"ladimo: {why}; 'format: pq' holds it, in its own class"

    def plan(self, view: ModelView) -> tuple[Stage, dict[str, Any]]:
        """The stage with its sizes and layers settled, and what the search measured."""
        layout = self._layout(ffn_neurons(view.arch, view.shape, view.sizes))
        budget = Budget.of(view.arch, view.shape, view.sizes, self.activated_reduction, layout)
        layout, facts = budget.layout, {}
        if self.aim == "parent" and self._stream_norm(view.arch) is None:
            log.warning(
                "ladimo: what the FFNs of a %s model put out is not added to the residual stream by "
                "itself and as it is: each learns its own outputs (aim: layer)",
                view.arch.model_type,
            )
        means = self._means_of_recipe(view.shape.n_blocks)
        if means is None:
            self._warn_of_much(budget)
            searcher = Searcher(
                view, budget, self.construction, self.policy == "adaptive", self.seed
            )
            found = searcher.search(self.activated_reduction)
            means, facts = (
                tuple(found.levels.get(i) for i in range(view.shape.n_blocks)),
                found.as_json(),
            )
        if any(mean is not None and not 0 <= mean <= layout.n for mean in means):
            raise ModelError(
                f"ladimo: mean_experts must lie between 0 and the {layout.n} routed experts there "
                "are"
            )
        levels = {index: mean for index, mean in enumerate(means) if mean is not None}
        reduction = budget.reduction(levels)
        log.info(
            "%.3f fewer activated parameters: %s of %d experts visited",
            reduction,
            list(means),
            layout.n,
        )
        facts |= {
            "counted": COUNTED,
            "activated_dense": budget.dense,
            "activated_reduction": reduction,
        }
        stage = self.model_copy(
            update={"shared": layout.shared, "experts": layout.n, "mean_experts": means}
        )
        return stage, facts | {
            "experts": layout.n,
            "expert_size": layout.size,
            "shared": layout.shared,
        }

    def _warn_of_much(self, budget: Budget) -> None:
        share = budget.share_of_ffns(self.activated_reduction)
        if share > _MUCH:
            log.warning(
                "ladimo: activated_reduction %g takes %.0f %% of this model's FFNs, since much of "
                "what a token meets is outside of them; expect large losses, or set it to %.3f, "
                "which takes half",
                self.activated_reduction,
                100 * share,
                self.activated_reduction * _MUCH / share,
            )

    def config(self, parent: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the container: the parent's own where no stock one fits."""
        if stock_misfit(parent):
            return dict(parent)
        # before it is planned
        layout = self._layout(parent["intermediate_size"]) or Layout(1, 1, 1)
        means = self.mean_experts if isinstance(self.mean_experts, tuple) else ()
        dense = [index for index, mean in enumerate(means) if mean is None]
        fixed = max((round(mean) for mean in means if mean is not None), default=1)
        return container_config(parent, layout, min(max(fixed, 1), layout.n), dense)

    def rewrites(self, index: int, name: str) -> bool:
        """The FFN where it became experts."""
        return self._means[index] is not None and is_of_experts(name)

    def linears(self, linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """The experts' linears in the place of the dense FFN's, where the plan has any."""
        means = self._means
        out: dict[str, tuple[int, int]] = {}
        for name, (N, K) in linears.items():
            index, _ = place_of(name) or (-1, name)
            routed = None
            if index >= 0 and means[index] is not None:
                routed = expert_linears(name, (N, K), self._layout)
            out |= {name: (N, K)} if routed is None else routed
        return out

    def room(self, sizes: BlockSizes) -> int:
        """Inputs and targets, the student with its gradients and AdamW's state, the
        parent's weights, a batch."""
        ffn = 3 * max(N * K for N, K in sizes.linears.values())
        lesson = 3 * FLOAT * min(self.tokens, sizes.tokens) * sizes.hidden
        return (
            lesson
            + 6 * FLOAT * ffn
            + sizes.forward()
            + 8 * FLOAT * self.batch_tokens * ffn // (3 * sizes.hidden)
        )

    @property
    def tokens_read(self) -> int:
        """Tokens to learn from, or those after which there are no more steps."""
        if self.teaching != "distill":
            return self.tokens
        return min(self.tokens, math.ceil(self.steps * self.batch_tokens / self.passes))

    def for_trial(self, tokens: int) -> Ladimo:
        """The stage without a search, its steps small enough for so few
        tokens to be met as often."""
        means = 1.0 if self.mean_experts is None else self.mean_experts
        batch = min(self.batch_tokens, max(1, tokens))
        return self.model_copy(update={"mean_experts": means, "batch_tokens": batch})

    def apply(self, block: Block) -> None:
        """Give the block the container's biases, and experts where the plan has them."""
        keep_parent(block)
        stock = fits_stock(block)
        for role in BIASED if stock else ():
            block.add_bias(block.arch.of_role(role))
        mean = self._means[block.index]
        if mean is None:
            return
        with measure(block.device) as cost:
            moe, facts = self._experts(block, mean)
        place = dense_ffn_of(block.arch)
        block.replace_ffn(moe, container(block.arch, moe, stock))
        block.note(place, **facts)
        block.costs[place] = cost

    def pictures(self, layers: Mapping[str, Mapping[str, Any]]) -> tuple[Picture, ...]:
        """Show sensitivities, errors against the baselines, routing scores
        and the load of the experts."""
        return pictures(layers, layers.get(self.method, {}))

    @property
    def _means(self) -> tuple[float | None, ...]:
        assert isinstance(self.mean_experts, tuple), "planned first"
        return self.mean_experts

    def _means_of_recipe(self, blocks: int) -> tuple[float | None, ...] | None:
        """The recipe's `mean_experts` for so many blocks, as the policy can hold them."""
        means = self.mean_experts
        if means is None:
            return None
        if not isinstance(means, tuple):
            means = (means,) * blocks
        if len(means) != blocks:
            raise ModelError(f"ladimo: mean_experts has {len(means)} entries for {blocks} blocks")
        routed = [mean for mean in means if mean is not None]
        if self.policy == "adaptive" or not routed:
            return means
        fixed = float(max(1, round(sum(routed) / len(routed))))
        if set(routed) != {fixed}:
            log.warning(
                "policy: top-k has one number of experts for all blocks: %g, the nearest to %s",
                fixed,
                routed,
            )
        return tuple(None if mean is None else fixed for mean in means)

    def _experts(self, block: Block, mean: float) -> tuple[MoeFfn, dict[str, Any]]:
        """Teach, or take up what was taught in a run that was stopped."""
        ffn, lesson = dense_ffn(block), self._lesson(block)
        layout = self._layout(ffn.neurons)
        assert layout is not None
        stored = block.storage[f"{block.arch.of_role('down')}.weight"]
        told = self.model_dump(mode="json") | {"block": block.index, "stored": str(stored)}
        key = digest(told, (ffn.gate, ffn.up, ffn.down, lesson.x, lesson.y))
        moe = empty_moe(layout, mean, block)
        kept = block.memo.recall(key)
        if kept is None:
            steps = min(
                self.steps, math.ceil(self.passes * lesson.train_tokens / self.batch_tokens)
            )
            training = Training(
                steps, self.batch_tokens, self.learning_rate, self.weight_decay, self.seed
            )
            adaptive = self.policy == "adaptive"
            teacher = Teacher(
                layout, self.construction, self.teaching, adaptive, training, stored, block.ranks
            )
            student, facts = teacher.teach(ffn, lesson, mean)
            student.write(moe)
            kept = (
                moe.state_dict(),
                facts
                | {"tokens": lesson.train_tokens, "routing": student.stored_policy().as_json()},
            )
            block.memo.keep(key, *kept)
        else:
            log.info(
                "%s was taught before and is taken up", block.full_name(dense_ffn_of(block.arch))
            )
        tensors, facts = kept
        # as it will be read
        moe.load_state_dict({name: tensor.to(stored) for name, tensor in tensors.items()})
        moe.policy = policy_from_json(facts["routing"])
        return moe, facts

    def _lesson(self, block: Block) -> Lesson:
        """Inputs of the FFN as they reach it, and what it should add to the residual stream."""
        place, norm = dense_ffn_of(block.arch), self._stream_norm(block.arch)
        inputs: list[Tensor] = []
        targets: list[Tensor] = []
        ffn, tokens = dense_ffn(block), 0
        outlet = Outlet.of(block, ffn)
        if outlet is None and block.arch.of_role("down") in block.arch.post_norms:
            norm = None
            block.note(place, aim="layer: the norm behind the FFN is not g y / rms(y)")
        recorded = [place] if norm is None else [norm, place]
        for batch, (*residual, x) in enumerate(inputs_of(block, recorded)):
            if residual:
                y = parent_outputs(block, batch) - residual[0]
            else:
                y = ffn(x) if outlet is None else outlet.after(ffn(x))
            finite = (x.isfinite() & y.isfinite()).all(dim=1)
            inputs.append(x[finite])
            targets.append(y[finite])
            tokens += len(inputs[-1])
            if tokens >= self.tokens:
                break
        lesson = Lesson(torch.cat(inputs)[: self.tokens], torch.cat(targets)[: self.tokens], outlet)
        if not len(lesson.x):
            raise ModelError(
                f"{block.full_name(place)}: no finite calibration inputs; try --dtype float32"
            )
        return lesson

    def _stream_norm(self, arch: Architecture) -> str | None:
        """The norm that reads the residual stream which the FFN's output is added to; None where
        the aim is the layer, or where what is added is not the FFN's output alone and as it is
        (multipliers behind FFNs, FFNs beside attention)."""
        alone = all(writer in arch.residual for writer in arch.writers)
        if self.aim == "layer" or not alone:
            return None
        return arch.residual.get(arch.of_role("down"))

    def _layout(self, neurons: int) -> Layout | None:
        """The sizes that the recipe gives for FFNs of so many neurons; ModelError
        where they do not divide."""
        if self.shared is None or self.experts is None:
            return None
        routed = neurons - self.shared
        unit = unit_of(neurons)
        if (
            routed <= 0
            or routed % self.experts
            or self.shared % unit
            or routed // self.experts % unit
        ):
            raise ModelError(
                f"ladimo: shared {self.shared} and {self.experts} experts do not divide an FFN of "
                f"{neurons} neurons into multiples of {unit}; change one of them or leave both out"
            )
        return Layout(self.experts, routed // self.experts, self.shared)
