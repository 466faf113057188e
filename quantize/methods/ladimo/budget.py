"""What a token's way through a model costs in parameters, and which
blocks give how much of it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantize.errors import ModelError
from quantize.methods.ladimo.split import Layout
from quantize.model.arch import Architecture, Shape, parameters_of_a_token
from quantize.model.dense_ffn import dense_ffn_of
from quantize.solvers.knapsack import knapsack

UNIT = 128
"""Sizes of experts are multiples of it, so that groups of 128 quantize them; for small or
odd FFNs of a part of it."""
# An FFN of fewer units than these leaves nothing to split into a shared and two routed experts.
_PARTS = 3
COUNTED = (
    "weights of all blocks, the final norm and the head; "
    "the embedding table, of which a token reads a row, is not"
)

Levels = Mapping[int, float]
"""Block → mean number of routed experts that a token visits there; blocks that
are not named stay dense."""


@dataclass(frozen=True)
class Budget:
    """Parameters that a token is multiplied with; see COUNTED."""

    blocks: int
    hidden: int
    neurons: int
    """Hidden neurons F of a dense FFN."""
    dense: int
    """Activated parameters of the dense model."""
    layout: Layout

    @classmethod
    def of(
        cls,
        arch: Architecture,
        shape: Shape,
        sizes: Mapping[str, tuple[int, ...]],
        reduction: float,
        layout: Layout | None,
    ) -> Budget:
        """Count the tensors of a checkpoint (`sizes`: full name → shape). layout: None
        to derive it from `reduction`.

        ModelError where the layout does not fill the FFN, or where no choice of
        layers comes to the reduction.
        """
        F = ffn_neurons(arch, shape, sizes)
        dense = parameters_of_a_token(arch, shape, sizes)
        if layout is None:
            share = min(reduction * dense / (3 * shape.hidden * F * shape.n_blocks), 0.9)
            layout = default_layout(F, share)
        if layout.neurons != F:
            raise ModelError(
                f"shared {layout.shared} and {layout.n} experts of {layout.size} are "
                f"{layout.neurons} neurons, the FFN has {F}"
            )
        found = cls(shape.n_blocks, shape.hidden, F, dense, layout)
        highest = found.reduction(dict.fromkeys(range(shape.n_blocks), 0.0))
        if reduction > highest:
            raise ModelError(
                f"activated_reduction {reduction:g} is out of reach: with a shared expert of "
                f"{layout.shared} of {F} neurons everywhere and no other expert it is "
                f"{highest:.3f}; lower it or set a smaller `shared`"
            )
        return found

    def share_of_ffns(self, reduction: float) -> float:
        """What saving this share of the activated parameters takes of all FFNs."""
        return reduction * self.dense / (self.blocks * self.block_cost(None))

    def block_cost(self, mean: float | None) -> int:
        """Parameters of one FFN that a token meets: with `mean` routed experts, None: dense."""
        return (
            3 * self.hidden * self.neurons
            if mean is None
            else ffn_cost(self.hidden, self.layout, mean)
        )

    def reduction(self, levels: Levels) -> float:
        """Share of the activated parameters that is saved."""
        saved = sum(self.block_cost(None) - self.block_cost(mean) for mean in levels.values())
        return saved / self.dense

    def choose(self, errors: Sequence[Mapping[float, float]], reduction: float) -> dict[int, float]:
        """Levels with the least sum of errors that save at least `reduction`.

        errors: for every block its error by mean number of experts; dense costs
        none. ModelError if out of reach.
        """
        options: list[list[tuple[int, float, float | None]]] = []
        for block in errors:
            found = [(self.block_cost(mean), error, mean) for mean, error in block.items()]
            # A level that saves nothing is none.
            dense = (self.block_cost(None), 0.0, None)
            options.append(
                sorted(
                    [*(o for o in found if o[0] < dense[0]), dense], key=lambda option: option[0]
                )
            )
        whole = self.blocks * self.block_cost(None)
        try:
            picks = knapsack(
                [[cost for cost, _, _ in block] for block in options],
                [[error for _, error, _ in block] for block in options],
                whole - round(reduction * self.dense),
            )
        except ValueError:
            raise ModelError(
                f"activated_reduction {reduction:g} is out of reach for these layers; lower it"
            ) from None
        chosen = {
            index: block[pick][2]
            for index, (block, pick) in enumerate(zip(options, picks, strict=True))
        }
        return {index: mean for index, mean in chosen.items() if mean is not None}


def ffn_neurons(arch: Architecture, shape: Shape, sizes: Mapping[str, tuple[int, ...]]) -> int:
    """Hidden neurons of every FFN of a dense model; sizes: full name → shape of its tensors.

    ModelError for a model whose FFNs are of several kinds or sizes.
    """
    dense_ffn_of(arch)
    down = f"{arch.of_role('down')}.weight"
    found = [sizes.get(f"{arch.blocks}.{i}.{down}") for i in range(shape.n_blocks)]
    for index, size in enumerate(found):
        if size is None or size != found[0]:
            what = "has no" if size is None else f"has {list(size)} for"
            raise ModelError(
                f"ladimo: block {index} {what} {down}: it takes models whose FFNs are all dense and "
                "of one size"
            )
    assert found[0] is not None
    return found[0][1]


def unit_of(neurons: int) -> int:
    """What the sizes of experts are multiples of: 128, or the largest power of two that
    leaves something to split."""
    unit = UNIT
    while unit > 1 and (neurons % unit or neurons < _PARTS * unit):
        unit //= 2
    return unit


def ffn_cost(hidden: int, layout: Layout, mean: float) -> int:
    """Parameters that a token meets in a routed FFN where it visits `mean` routed
    experts: the router counts."""
    return round(3 * hidden * (layout.shared + mean * layout.size)) + hidden * (layout.n + 1)


def neurons_for(hidden: int, layout: Layout, mean: float) -> int:
    """Neurons of a dense FFN that costs as much."""
    return min(layout.neurons, ffn_cost(hidden, layout, mean) // (3 * hidden))


def default_layout(neurons: int, share: float) -> Layout:
    """Sizes for FFNs of so many neurons that lose `share` of them per token on average.

    Routed experts are about a sixteenth of the FFN, at least a unit. The shared expert
    takes what lets a third of the
    routed ones be visited: measured, a large shared expert and few visits beat the opposite, down
    to a limit where nothing is left to route.
    """
    unit = unit_of(neurons)
    size = max(unit, round(neurons / 16 / unit) * unit)
    routed = 1.5 * share * neurons
    n = max(2, round(routed / size))
    while n > 2 and n * size >= neurons:
        n -= 1
    return Layout(n, size, neurons - n * size)
