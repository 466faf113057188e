"""What vLLM would not load or multiply of a checkpoint in its own format, told before it is tried.

Read in the source of vLLM 0.32 and tried on its CPU build: on a GPU, Marlin multiplies 4 and 8 bits
in groups of 32, 64 or 128 or in whole rows, and pads other sizes itself; the CPU build multiplies
matrices whose sides, after fusing, are multiples of 32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from quantize.formats.grouping import GROUPS

if TYPE_CHECKING:
    from quantize.formats.scheme import AnyScheme

_BITS = (4, 8)
_CPU_TILE = 32


def refusals(
    schemes: Mapping[str, AnyScheme],
    shapes: Mapping[str, tuple[int, int]],
    fused: Collection[tuple[str, ...]],
) -> list[str]:
    """A line for each thing that vLLM refuses, with what to do; empty where it takes all.

    schemes: of every packed linear. shapes: [N, K] of every linear, by full name as well. fused:
    linears of which vLLM makes one matrix, whether they are packed or not.
    """
    lines = []
    bits = Counter(scheme.bits for scheme in schemes.values() if scheme.bits not in _BITS)
    for number, count in sorted(bits.items()):
        lines.append(
            f"{_linears(count)}: {number} bits, which it multiplies only on a GPU with the optional "
            "humming kernels; 4 and 8 bits need none"
        )
    groups = Counter(scheme.group_size for scheme in schemes.values())
    for group, count in groups.items():
        if group is not None and group not in GROUPS:
            lines.append(
                f"{_linears(count)}: group {group}, for which it has no kernel in bfloat16 on a GPU; set "
                "group_size to 128, and sizes that 128 does not divide get 64, 32 or a whole row"
            )
    unlike = [names for names in fused if len({schemes.get(name) for name in names}) > 1]
    if unlike:
        names = [name.rpartition(".")[2] for name in unlike[0]]
        lines.append(
            f"{', '.join(names[:-1])} and {names[-1]} of {unlike[0][0].rpartition('.')[0]} are "
            f"packed in different ways{_more(len(unlike) - 1)}, and it makes one matrix of them; "
            "let one stage take them"
        )
    return lines + _on_cpus(schemes, shapes, fused)


def _on_cpus(
    schemes: Mapping[str, AnyScheme],
    shapes: Mapping[str, tuple[int, int]],
    fused: Collection[tuple[str, ...]],
) -> list[str]:
    """What its CPU build alone refuses."""
    together = {name for names in fused for name in names}
    matrices = [*fused, *((name,) for name in schemes if name not in together)]
    odd: Counter[int] = Counter()
    for names in matrices:
        if not all(name in schemes and name in shapes for name in names):
            continue
        sides = (shapes[names[0]][1], sum(shapes[name][0] for name in names))
        if wrong := [side for side in sides if side % _CPU_TILE]:
            odd[wrong[0]] += len(names)
    if not odd:
        return []
    sizes = ", ".join(str(size) for size in sorted(odd))
    return [
        f"{_linears(odd.total())} on a CPU, whose kernel takes multiples of {_CPU_TILE} alone and "
        f"not {sizes}; serve on a GPU, or with transformers"
    ]


def _linears(count: int) -> str:
    return f"{count} linear{'s' * (count > 1)}"


def _more(count: int) -> str:
    return f" (and {count} more such)" if count else ""
