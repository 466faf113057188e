"""What vLLM would not load or multiply of a checkpoint in its own format, told before it is tried.

Which kernels there are, and what they take, stands in `quantize.formats.engines`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantize.formats.engines import CPU, HOPPER, KERNELS, TURING, VLLM, kernels_for
from quantize.formats.grouping import GROUPS, fitting_group

if TYPE_CHECKING:
    from quantize.formats.scheme import AnyScheme

_PLAIN_BITS = (4, 8)
"""What needs nothing but vLLM, on any of its GPUs."""


@dataclass(frozen=True)
class Unserved:
    """One thing that an engine does not take."""

    where: str
    """The engine, its release, and the hardware where that matters."""
    what: str
    """The linears, why, and the nearest that works."""
    hardware: frozenset[str]
    """On what it is not taken, without an optional package."""

    @property
    def refused(self) -> bool:
        """Whether no GPU takes it without an optional package; else it is served on some hardware."""
        return self.hardware >= {TURING, HOPPER}

    def __str__(self) -> str:
        return f"not in {self.where}: {self.what}"


def unserved(
    schemes: Mapping[str, AnyScheme],
    shapes: Mapping[str, tuple[int, int]],
    fused: Collection[tuple[str, ...]],
    routed: Collection[tuple[str, ...]] = (),
) -> list[Unserved]:
    """A line for each thing that vLLM does not take, what is refused everywhere first.

    schemes: of every packed linear. shapes: [N, K] of every linear, by full name as well; empty
    where no model is known. fused: linears of which vLLM makes one matrix, whether they are packed
    or not. routed: the same of the routed experts of one FFN, all of which it stacks.
    """
    experts = {name for names in routed for name in names}
    lines = list(_without_kernel(schemes, shapes, experts))
    lines += _unlike(schemes, fused, routed, experts)
    lines += _off_hopper(schemes, shapes, experts)
    return lines + _on_cpus(schemes, shapes, fused, experts)


def _without_kernel(
    schemes: Mapping[str, AnyScheme],
    shapes: Mapping[str, tuple[int, int]],
    experts: Collection[str],
) -> Iterator[Unserved]:
    """Bits and groups that no GPU multiplies with vLLM alone."""
    lacking: dict[AnyScheme, list[str]] = {}
    for name, scheme in schemes.items():
        kernels = kernels_for(VLLM, scheme, name in experts, (TURING, HOPPER))
        if all(kernel.needs for kernel in kernels):
            lacking.setdefault(scheme, []).append(name)
    by_bits: dict[int, list[str]] = {}
    by_group: dict[int | None, list[str]] = {}
    for scheme, names in lacking.items():
        if scheme.bits not in _PLAIN_BITS:
            by_bits.setdefault(scheme.bits, []).extend(names)
        else:
            by_group.setdefault(scheme.group_size, []).extend(names)
    for number, names in sorted(by_bits.items()):
        near = min(bits for bits in (*_PLAIN_BITS, 8) if bits >= number)
        extra = next(kernel.needs for kernel in KERNELS if kernel.needs and number in kernel.bits)
        yield _refused(
            f"{_linears(_sized(names, shapes))}: {number} bits, which only {extra} multiply, on "
            f"GPUs; set bits to {near}"
        )
    for group, names in by_group.items():
        yield _refused(
            f"{_linears(_sized(names, shapes))}: group {group}, for which it has no kernel in bfloat16 on GPUs; "
            f"{_nearest_group([shapes[name][1] for name in names if name in shapes])}"
        )


def _nearest_group(inputs: Sequence[int]) -> str:
    """Which `group_size` is served in the place of one that is not."""
    served = fitting_group(GROUPS[0], inputs)
    if served is None:
        return f"set group_size to {GROUPS[0]}; what it does not divide gets 64, 32 or a whole row"
    return f"set group_size to {served}"


def _unlike(
    schemes: Mapping[str, AnyScheme],
    fused: Collection[tuple[str, ...]],
    routed: Collection[tuple[str, ...]],
    experts: Collection[str],
) -> Iterator[Unserved]:
    """Matrices whose parts are packed in different ways."""
    for sets, what in ((fused, ""), (routed, "the experts of ")):
        unlike = [
            names
            for names in sets
            if len({schemes.get(name) for name in names}) > 1
            and (what or names[0] not in experts)  # said once, of all experts
        ]
        if not unlike:
            continue
        names = [name.rpartition(".")[2] for name in unlike[0]]
        parts = f"{', '.join(names[:-1])} and {names[-1]} of {unlike[0][0].rpartition('.')[0]}"
        if what:
            parts = what + unlike[0][0].rsplit(".", 3)[0]
        yield _refused(
            f"{parts} are packed in different ways{_more(len(unlike) - 1)}, and it makes one matrix "
            "of them; let one stage take them, or leave all of them out"
        )


def _off_hopper(
    schemes: Mapping[str, AnyScheme],
    shapes: Mapping[str, tuple[int, int]],
    experts: Collection[str],
) -> list[Unserved]:
    """Inputs in FP8, which one generation of GPUs multiplies."""
    names = [
        name
        for name, scheme in schemes.items()
        if kernels_for(VLLM, scheme, name in experts, (HOPPER,))
        and not kernels_for(VLLM, scheme, name in experts, (TURING,))
    ]
    if not names:
        return []
    what = (
        f"{_linears(_sized(names, shapes))} with inputs in FP8, which need compute capability 9.0; activations: none "
        f"runs on {TURING}"
    )
    return [Unserved(f"{VLLM} but on {HOPPER}", what, frozenset({TURING, CPU}))]


def _on_cpus(
    schemes: Mapping[str, AnyScheme],
    shapes: Mapping[str, tuple[int, int]],
    fused: Collection[tuple[str, ...]],
    experts: Collection[str],
) -> list[Unserved]:
    """What its CPU build alone refuses."""
    together = {name for names in fused for name in names}
    matrices = [*fused, *((name,) for name in schemes if name not in together)]
    odd: Counter[int] = Counter()
    wide = stacked = 0
    for names in matrices:
        if not all(name in schemes and name in shapes for name in names):
            continue
        scheme = schemes[names[0]]
        if any(schemes[name] != scheme for name in names) or scheme.fp8_activations:
            continue  # said already, and for more than CPUs
        on_gpus = kernels_for(VLLM, scheme, names[0] in experts, (TURING,))
        if all(kernel.needs for kernel in on_gpus):
            continue
        kernels = kernels_for(VLLM, scheme, hardware=(CPU,))
        shape = (sum(shapes[name][0] for name in names), shapes[names[0]][1])
        if not kernels:
            wide += len(names) * (scheme.bits in _PLAIN_BITS)
        elif names[0] in experts:
            stacked += len(names)
        elif not any(kernel.fits(shape) for kernel in kernels):
            side = kernels[0].side
            odd[next(length for length in reversed(shape) if length % side)] += len(names)
    parts = [f"{_linears(wide)} of 8 bits"] if wide else []
    parts += [f"{_linears(stacked)} of routed experts, which need AMX"] if stacked else []
    if odd:
        tile = next(kernel.side for kernel in KERNELS if kernel.hardware == CPU)
        sizes = ", ".join(str(size) for size in sorted(odd))
        parts.append(f"{_linears(odd.total())} of sizes that {tile} does not divide ({sizes})")
    if not parts:
        return []
    what = f"{', '.join(parts)}; serve on a GPU, or with transformers"
    return [Unserved(f"{VLLM} on {CPU}", what, frozenset({CPU}))]


def _refused(what: str) -> Unserved:
    return Unserved(str(VLLM), what, frozenset({TURING, HOPPER, CPU}))


def _sized(names: Sequence[str], shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(name in shapes for name in names)


def _linears(count: int) -> str:
    """So many linears; 0 where there is no model whose linears could be counted."""
    return f"{count} linear{'s' * (count > 1)}" if count else "linears"


def _more(count: int) -> str:
    return f" (and {count} more such)" if count else ""
