"""What a conversion knows before it loads weights: the source's headers, the model's
sizes, the calibration text."""

from __future__ import annotations

import logging

from quantize.calibration.fit import say, warn_of_length, warn_of_tokenizer, warn_without_bos
from quantize.calibration.tokens import TokenSet, calibration_tokens, check_vocab
from quantize.conversion.allocation import Space
from quantize.conversion.head import HEAD_GROUP
from quantize.conversion.joint import shared_tokens
from quantize.conversion.output import facts_of
from quantize.conversion.patterns import require_patterns
from quantize.conversion.plan import Decisions, Plan
from quantize.conversion.request import Request
from quantize.conversion.serving import foretell, foretell_roughly, linears_of
from quantize.errors import ModelError, RecipeError, UsageError
from quantize.files.checkpoint import Checkpoint
from quantize.formats.registry import FORMATS
from quantize.methods.basis import Basis
from quantize.methods.encode import Encode, IntEncode
from quantize.model.arch import Architecture, Shape
from quantize.model.build import require_text_class
from quantize.model.dequantized import open_source, require_source
from quantize.model.load import require_layers, shape_of
from quantize.model.positions import require_positions
from quantize.model.skeleton import Skeleton
from quantize.model.stored import StoredCheckpoint, open_stored
from quantize.model.tied import settle_tie
from quantize.model.tokenizer import load_tokenizer
from quantize.recipe.recipe import Recipe, format_problems

log = logging.getLogger(__name__)


def draft(request: Request, aloud: bool = True) -> tuple[Plan, Space | None, TokenSet | None]:
    """The plan so far, what a target of bits per weight lets choose, and
    calibration text where any is needed.

    aloud: whether to warn of windows that do not suit the model, and of what is not served.
    Raises what `convert` raises before it loads weights.
    """
    plan = sized(request, aloud)
    source, skeleton, shape = plan.source, plan.skeleton, plan.shape
    space = _space(request, plan.arch, skeleton.linears())
    tokens = None
    if space or any(stage.needs_inputs for stage in request.recipe.stages):
        tokens = shared_tokens(
            request.ranks, lambda: _calibration(request, source, skeleton, shape, aloud)
        )
    return plan, space, tokens


def sized(request: Request, aloud: bool = True) -> Plan:
    """The plan as far as headers tell, without text. Arguments and errors as of `draft`."""
    on_disk = open_source(request.model)
    require_source(on_disk)
    shape = shape_of(on_disk)
    require_layers(on_disk, shape)
    source, model = open_stored(on_disk, request.dtype)
    require_text_class(request.model, model)
    skeleton = Skeleton(request.model, request.device, request.dtype, model=model)
    skeleton.check(source.shapes, shape.tied)
    arch = skeleton.arch
    shape = settle_tie(source, arch, shape)
    if aloud:
        for note in source.notes:
            log.warning("%s", note)
    _check(source, arch, shape, skeleton, request.recipe)
    plan = Plan(request, source, arch, shape, skeleton, Decisions(request.recipe))
    _require_format(plan)
    if plan.needs_decisions:  # its linears are not known yet
        foretell_roughly(plan, aloud)
    else:
        foretell(plan, aloud=aloud)
    return plan


def _require_format(plan: Plan) -> None:
    """ModelError for a model that the format cannot hold."""
    # What a stage makes of them is not known before it has seen the text.
    linears = plan.skeleton.linears() if plan.needs_decisions else linears_of(plan)
    stages = [stage for stage in plan.recipe.stages if isinstance(stage, Encode)]
    packed = {n: size for n, size in linears.items() if any(s.selects(n) for s in stages)}
    if plan.recipe.head_bits is not None or plan.recipe.embedding_bits is not None:
        packed[plan.arch.head] = (plan.shape.vocab, plan.shape.hidden)
    facts, names = facts_of(plan, plan.source.config), plan.source.names()
    for text in plan.format.model_problems(facts, names, packed, plan.source.folder):
        raise ModelError(f"{plan.source.folder}: format: {plan.recipe.format}: {text}")


def _check(
    source: StoredCheckpoint, arch: Architecture, shape: Shape, skeleton: Skeleton, recipe: Recipe
) -> None:
    """Everything that can be refused before the first block is computed."""
    source.side_files()
    basis = Basis(recipe.stages)
    if basis.is_changed and (carried := next(iter(source.leftovers.carried), None)):
        raise ModelError(
            f"recipe stage rotate: {carried}, which is carried over unchanged, reads the stream in "
            "the parent's basis; set residual: false"
        )
    # Where the embedding is packed, a head that shares it has these bits already.
    shares = shape.tied and not basis.unties(shape)
    if recipe.head_bits is not None and shares and recipe.head_bits != recipe.embedding_bits:
        raise ModelError(
            f"head_bits: {arch.head} shares its weights with the embedding; remove head_bits"
        )
    strict = any(isinstance(stage, IntEncode) and stage.strict for stage in recipe.stages)
    if recipe.head_bits is not None and strict and shape.hidden % HEAD_GROUP:
        raise ModelError(
            f"head_bits: {shape.hidden} inputs of {arch.head} are no multiple of the group "
            f"{HEAD_GROUP}; set strict to false or remove head_bits"
        )
    for index, field, problem in format_problems(recipe):
        raise RecipeError(f"recipe {recipe.name}: stages[{index}].{field}: {problem}")
    config = source.config
    for stage in recipe.stages:
        if not FORMATS[recipe.format].keeps_experts and (reason := stage.needs_native(config)):
            raise ModelError(reason)
        config = stage.config(config)
    if not any(stage.needs_plan for stage in recipe.stages):  # else its linears are not known yet
        check_linears(recipe, source, arch, shape, skeleton.linears())


def check_linears(
    recipe: Recipe,
    source: StoredCheckpoint,
    arch: Architecture,
    shape: Shape,
    linears: dict[str, tuple[int, int]],
) -> None:
    """Refuse what a stage cannot handle. linears: full name → [N, K], those of the source."""
    if not linears:
        raise ModelError(
            f"the blocks of this {arch.model_type} model have no linears (nn.Linear), so that there "
            "is nothing to convert; take a model of another type"
        )
    for stage in recipe.stages:
        stage.check_model(arch, shape, linears)
        if isinstance(stage, Encode):
            require_patterns(stage, recipe, source, arch, linears)
        stage.check(linears)
        linears = stage.linears(linears)


def _space(
    request: Request, arch: Architecture, linears: dict[str, tuple[int, int]]
) -> Space | None:
    """What a target of bits per weight lets choose; None without a target."""
    target = request.recipe.target_bpw if request.target_bpw is None else request.target_bpw
    if target is not None and any(stage.kind == "restructure" for stage in request.recipe.stages):
        raise UsageError(
            f"target_bpw {target:g}: a recipe that restructures has none; convert with the "
            "restructure stage alone, then its output with the others and a target"
        )
    return None if target is None else Space.of(request.recipe, arch, linears, target)


def _calibration(
    request: Request, source: Checkpoint, skeleton: Skeleton, shape: Shape, aloud: bool
) -> TokenSet:
    c = request.recipe.calibration
    require_positions(skeleton.model, c.seqlen)
    tokenizer = load_tokenizer(request.model)
    tokens = calibration_tokens(
        tokenizer,
        dataset=c.dataset,
        nsamples=c.nsamples,
        seqlen=c.seqlen,
        seed=c.seed,
        chat_template=c.chat_template,
        text_field=c.text_field,
        bos=c.bos,
        held_out=request.check_windows if request.ranks.first else 0,
    )
    check_vocab(tokens.tokens, shape.vocab)
    if aloud:
        say(tokens.notes)
        warn_of_tokenizer(tokenizer, shape.vocab)
        warn_without_bos(tokenizer, c.bos)
        warn_of_length(c.seqlen, source.config)
    return tokens
