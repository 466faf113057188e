"""Decisions that depend on the whole model, taken before the first block is changed."""

from __future__ import annotations

import logging
from functools import partial

import torch

from quantize.calibration.tokens import TokenSet
from quantize.conversion.allocation import Space
from quantize.conversion.draft import check_linears
from quantize.conversion.plan import Plan
from quantize.conversion.request import Progress
from quantize.conversion.serving import expected_schemes, foretell, unserved
from quantize.conversion.source import open_block, sample, view_of

log = logging.getLogger(__name__)


def decide(plan: Plan, space: Space | None, tokens: TokenSet | None, progress: Progress) -> Plan:
    """The plan with all that is to be decided. space: what a target of bits per weight lets choose,
    if there is one."""
    told = [] if plan.needs_decisions else unserved(plan, expected_schemes(plan))
    drafted = plan
    if tokens and plan.needs_decisions:
        plan = _by_stages(plan, tokens, progress)
        check_linears(plan.recipe, plan.source, plan.arch, plan.shape, plan.skeleton.linears())
    if space and tokens:
        plan = _by_budget(plan, space, tokens, progress)
    if plan is not drafted:
        foretell(plan, told)
    return plan


@torch.no_grad()
def _by_stages(plan: Plan, tokens: TokenSet, progress: Progress) -> Plan:
    """Let every stage that plans ahead fill in what it left open."""
    stages, findings = [], {}
    for stage in plan.recipe.stages:
        if stage.needs_plan:
            stage, findings[stage.method] = stage.plan(view_of(plan, tokens, progress))
        stages.append(stage)
    recipe = plan.recipe.model_copy(update={"stages": tuple(stages)})
    return plan.decide(recipe=recipe, findings=findings)


def _by_budget(plan: Plan, space: Space, tokens: TokenSet, progress: Progress) -> Plan:
    """Spend the bits of `space` where they help most, by what rounding each linear alone costs."""
    opener, blocks = partial(open_block, plan), plan.shape.n_blocks
    errors = space.measure(opener, blocks, sample(plan, tokens), progress, plan.request.ranks)
    chosen = space.choose(errors)
    log.info(
        "%.3f bits per weight for a target of %g: %s",
        chosen.bits_per_weight,
        chosen.target,
        chosen.bits,
    )
    return plan.decide(recipe=chosen.recipe, allocation=chosen)
