"""What `pq inspect` would find in an output, told before anything is converted.

Bytes are those that stages and sizes settle: of packed integers to the byte, of other layouts as the
stages count them. What a stage decides on by measuring is not known, and refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from quantize.conversion.draft import sized
from quantize.conversion.head import head_scheme
from quantize.conversion.output import output_config
from quantize.conversion.plan import Plan
from quantize.conversion.request import Request
from quantize.conversion.serving import expected_schemes, linears_of
from quantize.conversion.state import State
from quantize.errors import ModelError, UsageError
from quantize.formats.gguf.blocks import BLOCK, KINDS
from quantize.formats.scheme import STORED_AS, AnyScheme
from quantize.inspect.inspection import DecoderBlock, Inspection, Linear, Other, inspect
from quantize.methods.encode import Encode
from quantize.model.roles import role_of

_NOTE = 16
"""Bytes of the note of a packed linear's shape."""


def foretold(request: Request) -> tuple[Inspection, dict[str, Any]]:
    """(what `inspect` would say of the output, its config.json) of a conversion that has not run.

    Only headers are read. Of the inspection `blocks` and `outside` are the output's, all else is the
    parent's. UsageError for a recipe that decides on its linears by measuring; further errors are
    those of `convert` before it loads weights.
    """
    recipe = request.recipe
    asking = [stage.method for stage in recipe.stages if stage.needs_plan]
    if asking:
        raise UsageError(
            f"recipe {recipe.name}: what {asking[0]} makes of a model is known only once it has "
            "measured; convert, and name the output's folder"
        )
    if request.target_bpw is not None or recipe.target_bpw is not None:
        raise UsageError(
            f"recipe {recipe.name}: how a budget of bits is spent is known only once it was measured; "
            "convert, and name the output's folder"
        )
    plan = sized(request, aloud=False)
    schemes = expected_schemes(plan)
    packed = {name: _packed(plan, name, size, schemes) for name, size in linears_of(plan).items()}
    encoded = {name: linear for name, linear in packed.items() if linear is not None}
    found = inspect(request.model)
    homes = tuple(f"{block.name}." for block in found.blocks)
    if strange := next((name for name in encoded if not name.startswith(homes)), None):
        raise ModelError(
            f"{request.model}: {strange} is called otherwise in its files; convert, and name the "
            "output's folder"
        )
    blocks = tuple(_block(block, encoded, _cache(plan, block)) for block in found.blocks)
    outside = tuple(_outside(plan, found.outside))
    config = output_config(plan, State(schemes=schemes))
    return replace(found, blocks=blocks, outside=outside, origin=None), config


def _packed(
    plan: Plan, name: str, size: tuple[int, int], schemes: Mapping[str, AnyScheme]
) -> Linear | None:
    """A linear [N, K] as the output has it, by its full name; None where it stays as it is."""
    stages = (stage for stage in plan.recipe.stages if isinstance(stage, Encode))
    stage = next((stage for stage in stages if stage.selects(name)), None)
    if stage is None:
        return None
    N, K = size
    scheme = schemes.get(name)
    bits: int | None
    group: int | None
    if scheme is not None:
        held, bits, group = scheme.layout(N, K), scheme.bits, scheme.group_size or K
        stored = sum(dtype.itemsize * math.prod(shape) for dtype, shape in held.values())
        rounded = "fp8" if scheme.fp8_activations else "none"
    else:
        bits, group = getattr(stage, "bits", None), getattr(stage, "group_size", BLOCK)
        rounded = "none"
        stored = math.ceil(N * K * stage.stored_bits(N, K) / 8) + _NOTE
    return Linear(
        name=name,
        role="",
        shape=size,
        format=plan.format.name,
        bits=bits,
        group_size=group,
        activations=rounded,
        quantized=True,
        weights=N * K,
        bytes=stored,
        bits_per_weight=8 * stored / (N * K),
    )


def _cache(plan: Plan, block: DecoderBlock) -> list[Other]:
    """What the output has of attention on an INT4 cache."""
    if not block.name.startswith(f"{plan.arch.blocks}."):
        return []
    return [
        Other(name, "F32", size, 4 * math.prod(size))
        for name, size in plan.cache_tensors(block.index).items()
    ]


def _block(
    block: DecoderBlock, encoded: Mapping[str, Linear], cache: Sequence[Other]
) -> DecoderBlock:
    """A block with what becomes of its linears, and with `cache`. Experts that the source keeps in
    stacks stand apart where they are packed."""
    start = f"{block.name}."
    mine = {name.removeprefix(start): x for name, x in encoded.items() if name.startswith(start)}
    there = {linear.name for linear in block.linears}
    apart = {name.rpartition(".experts.")[0] for name in set(mine) - there if ".experts." in name}
    kept = [x for x in block.others if not (len(x.shape) > 2 and _lies_in(x.name, apart))]
    others = tuple(sorted([*kept, *cache], key=lambda x: x.name))
    linears = [
        replace(x, name=name, role=role_of(name) or name.rpartition(".")[2])
        for name, x in mine.items()
    ]
    linears += [_plain(x) for x in block.linears if x.name not in mine]
    size = sum(x.bytes for x in linears) + sum(x.bytes for x in others)
    return replace(block, linears=tuple(linears), others=others, bytes=size)


def _lies_in(name: str, places: set[str]) -> bool:
    return any(name.startswith(f"{place}.experts") for place in places)


def _plain(linear: Linear) -> Linear:
    """A linear that no stage encodes: in 16 bits, also where the source has it packed."""
    if not linear.quantized or linear.weights is None:
        return linear
    plain = {"format": "bfloat16", "bits": 16, "group_size": None, "activations": "none"}
    return replace(linear, **plain, quantized=False, bytes=2 * linear.weights)  # type: ignore[arg-type]


def _outside(plan: Plan, outside: Iterable[Other]) -> Iterator[Other]:
    """Tensors around the blocks: embedding and head in their bits, and a head of its own where a
    stage gives the model one."""
    arch, shape, recipe = plan.arch, plan.shape, plan.recipe
    size = (shape.vocab, shape.hidden)
    tables = {arch.head: recipe.head_bits, arch.embedding: recipe.embedding_bits}
    unties = plan.basis.unties(shape)
    heads = False
    for other in outside:
        module, _, part = other.name.rpartition(".")
        heads = heads or module == arch.head
        if part != "weight" or tables.get(module) is None:
            yield other
    if unties and not heads and recipe.head_bits is None:
        yield Other(f"{arch.head}.weight", "BF16", size, 2 * math.prod(size))
    for module, bits in tables.items():
        if bits is None or (module == arch.head and shape.tied and not unties):
            continue
        for part, (dtype, dims) in _table(plan, module, bits).items():
            yield Other(
                f"{module}.{part}", STORED_AS[dtype], dims, dtype.itemsize * math.prod(dims)
            )


def _table(plan: Plan, module: str, bits: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Tensors of a packed embedding or head, by suffix."""
    V, D = plan.shape.vocab, plan.shape.hidden
    if plan.format.keeps_blocks:
        kind = KINDS["q8_0" if bits > 5 else "q4_0"]
        return {f"weight_{kind.name}": (torch.uint8, (V, D // BLOCK * kind.bytes))}
    return head_scheme(bits, D).layout(V, D)
