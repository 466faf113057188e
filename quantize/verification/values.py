"""Whether the numbers in a checkpoint are ones that a serving kernel can use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantize.errors import VerifyError
from quantize.formats.fp8 import representable_scale, row_factor
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


def _reloads(recipe: Recipe | None, linear: str) -> bool:
    """Whether the recipe keeps the scales of the linear with this full name to E4M3
    multiples of a row factor."""
    stages = [stage for stage in recipe.stages if stage.kind == "encode"] if recipe else []
    return any(
        getattr(stage, "fp8", False)
        and getattr(stage, "rounding", None) == "descent"
        and getattr(stage, "scales", None) == "row"
        and stage.selects(linear)  # type: ignore[attr-defined]  # every encode stage has it
        for stage in stages
    )


def _scale_problem(scale: Tensor, fp8: bool, reloads: bool) -> str | None:
    if (scale == 0).any():
        return f"holds {int((scale == 0).sum())} zeros"
    if fp8 and (scale < 0).any():
        return f"holds {int((scale < 0).sum())} negative values, which FP8 kernels cannot take"
    # A linear whose sizes no FP8 kernel takes has scales of its own kind.
    if fp8 and reloads and not torch.equal(representable_scale(scale, row_factor(scale)), scale):
        return "does not survive a reload through E4M3"
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
