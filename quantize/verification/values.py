"""Whether the numbers in a checkpoint are ones that a serving kernel can use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantize.errors import VerifyError
from quantize.formats.fp8 import reloaded
from quantize.formats.grouping import shard_counts
from quantize.methods.encode import IntEncode
from quantize.model.roles import splits_inputs
from quantize.recipe.recipe import Recipe
from quantize.verification.checks import Skipped, summarize
from quantize.verification.layout import FLOATS, Layout

Tick = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


def check_values(layout: Layout, recipe: Recipe | None, tick: Tick) -> str:
    """All floats are finite and group scales usable; VerifyError names the tensors that are not.

    Scales: nonzero; positive under FP8 activations; and, where the recipe keeps them to E4M3
    multiples of a per-row factor, such that a reload finds the same E4M3 codes again.
    """
    names = [n for n, header in layout.headers.items() if header.dtype in FLOATS]
    problems = []
    for done, name in enumerate(names):
        tick(done, len(names))
        tensor = layout.source.tensor(name)
        if not all(torch.isfinite(piece).all() for piece in torch.split(tensor.flatten(), 1 << 24)):
            problems.append(f"{name} holds NaN or Inf")
        elif name.endswith(".weight_scale"):
            linear = name.removesuffix(".weight_scale")
            problem = _scale_problem(
                tensor, layout.schemes[linear].fp8_activations, _reloads(recipe, linear)
            )
            problems += [f"{name} {problem}"] if problem else []
    if problems:
        raise VerifyError(summarize(problems))
    scales = sum(name.endswith(".weight_scale") for name in names)
    return f"{len(names)} float tensors are finite" + (
        f", {scales} of them usable scales" if scales else ""
    )


def _reloads(recipe: Recipe | None, linear: str) -> tuple[int, ...]:
    """Among how many GPUs the recipe promises that engines find the scales of the linear with this
    full name again; empty where it promises nothing."""
    for stage in recipe.stages if recipe else ():
        if isinstance(stage, IntEncode) and stage.selects(linear):
            if not stage.fp8 or getattr(stage, "scales", "row") != "row":
                return ()
            if (
                "tensor_parallel" not in stage.model_fields_set
            ):  # an older release, which promised less
                return (1,) if getattr(stage, "rounding", None) == "descent" else ()
            return (1, *(stage.tensor_parallel if splits_inputs(linear) else ()))
    return ()


def _scale_problem(scale: Tensor, fp8: bool, reloads: tuple[int, ...]) -> str | None:
    if (scale == 0).any():
        return f"holds {int((scale == 0).sum())} zeros"
    # A linear whose sizes no FP8 kernel takes has scales of its own kind.
    if fp8 and reloads:
        for shards in (1, *shard_counts(scale.shape[1], reloads)):
            if not torch.equal(reloaded(scale, shards), scale):
                among = f" in {shards} shards" if shards > 1 else ""
                return f"does not survive a reload through E4M3{among}"
    return None


def check_packing(layout: Layout, tick: Tick) -> str:
    """Codes unpack and pack to the same bytes, so padding bits are zero; VerifyError
    names the tensors that do not."""
    if not layout.schemes:
        raise Skipped("there are no packed linears")
    problems = []
    for done, (name, scheme) in enumerate(layout.schemes.items()):
        tick(done, len(layout.schemes))
        stored = {suffix: layout.source.tensor(f"{name}.{suffix}") for suffix in scheme.suffixes}
        try:
            again = scheme.read(stored).tensors()
        except ValueError as err:
            problems.append(f"{name}: {err}")
            continue
        problems += [
            f"{name}.{suffix} holds bits beside its codes"
            for suffix, tensor in stored.items()
            if not torch.equal(again[suffix].view(torch.uint8), tensor.view(torch.uint8))
        ]
    if problems:
        raise VerifyError(summarize(problems))
    return f"{len(layout.schemes)} packed tensors unpack and pack to the same bytes"
