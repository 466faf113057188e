"""How much memory the steps of a conversion take, from sizes alone.

Formulas count the tensors that are alive at once; tests/cost/test_footprint.py holds
them against what is allocated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

FLOAT = 4
"""Bytes of what statistics and solvers compute in."""
SOLVER_ROWS = 1024
"""Rows or columns of a large matrix that solvers work on at once, where all
would take too much room. Fewer take less, and give products that are less efficient."""
KEPT_TOKENS = 1024
"""Tokens kept by themselves, in whole windows, to judge a correction by: a thousand tell what share of it
holds to a few percent."""
LONGEST_KEPT = 2048
"""Tokens kept of a window that is longer: what judges a correction takes room and time by their square."""
FEWEST_WINDOWS = 8
"""One window of so many is kept at most; where the text has fewer, none."""
SCORES = 1 << 24
"""float32 scores held at once while tokens are weighed by the attention they receive, and"""
QUERIES = 128
"""the queries that they are of, at most: as `model.attention_received` has it."""

_VISITS = 4
"""Routed experts that a token is taken to visit, where inputs of all are recorded."""


@dataclass(frozen=True)
class BlockSizes:
    """One decoder block, the calibration text and the passes in which it is sent through."""

    linears: Mapping[str, tuple[int, int]]
    """Shape [N, K] of every linear, by name relative to the block."""
    groups: tuple[tuple[str, ...], ...]
    """Linears that share an input, in the order in which the block computes them."""
    residual: frozenset[str]
    """Linears whose output is added to the residual stream."""
    routed: frozenset[str]
    """Linears of experts that see only the tokens routed to them."""
    hidden: int
    heads: int
    kv_heads: int
    window: int
    """Tokens of one sequence."""
    batch: int
    """Tokens of one pass."""
    tokens: int
    """Tokens of the whole text."""
    itemsize: int
    """Bytes of the dtype that blocks compute in."""
    stops: frozenset[str] = frozenset()
    """First linears of the groups that passes wait before."""
    goes_ahead: bool = False
    """Whether the parent's passes go on beside what is done with the block."""
    stream: int = 0
    """Channels that go from block to block; 0: the hidden size."""

    @property
    def weights(self) -> int:
        """Weights of all linears."""
        return sum(N * K for N, K in self.linears.values())

    @property
    def largest(self) -> int:
        """Weights of the largest linear."""
        return max(N * K for N, K in self.linears.values())

    @property
    def together(self) -> int:
        """Weights of the largest linears that share an input."""
        return max(
            sum(N * K for N, K in (self.linears[name] for name in group)) for group in self.groups
        )

    def folding(self) -> int:
        """Bytes of the linears that share an input when all their columns are scaled."""
        return self.itemsize * (self.together + self.largest)

    def forward(self) -> int:
        """Bytes of one pass through the block, at its widest."""
        wide = max((N for N, _ in self.linears.values()), default=0)
        attention = (6 + 3 * self.kv_heads / self.heads) * self.hidden
        return int(
            self.itemsize
            * self.batch
            * max(3 * wide + 2 * max(self.hidden, self.stream), attention)
        )

    def beside(self) -> int:
        """Bytes of a pass of the parent's that goes on while linears are measured or fitted."""
        return self.forward() if self.goes_ahead else 0

    def moment_bytes(self, name: str, with_parent: bool) -> int:
        """Bytes of the moments of a linear's inputs."""
        N, K = self.linears[name]
        if not with_parent or name in self.routed:
            return FLOAT * K * K
        residual = name in self.residual
        return FLOAT * (
            K * K + (N * K if residual else K * K) + self.kept * (K + (N if residual else K))
        )

    @property
    def kept(self) -> int:
        """Tokens at most that are kept by themselves to judge corrections by."""
        of_one = min(self.window, LONGEST_KEPT)
        return min(max(of_one, KEPT_TOKENS), self.tokens // FEWEST_WINDOWS)

    def correcting(self, group: Sequence[str]) -> int:
        """Bytes at most while the weights of linears that share an input are corrected for the drift
        from the parent, beside its moments: the factor of the Hessian's inverse, the targets, and what
        the kept windows take."""
        S, K = self.kept, self.linears[group[0]][1]
        N = max(self.linears[name][0] for name in group)
        made = sum(self.linears[name][0] for name in group) * K
        made += N * K if self.itemsize < FLOAT else 0  # the weight as float32
        return FLOAT * (K * K + max(S * K + 2 * S * S, made + S * S + max(2 * N * K, 5 * S * N)))

    def measuring(self, name: str, with_parent: bool, fp8: bool) -> int:
        """Bytes at most while the moments of a linear's inputs are
        measured, themselves included."""
        N, K = self.linears[name]
        held = self.moment_bytes(name, with_parent)
        if name in self.routed:  # several experts in one pass
            alike = sum(
                1 for other in self.routed if other.rpartition(".")[2] == name.rpartition(".")[2]
            )
            held = max(held, min(alike * held, ROUTED_BYTES))
        streams = 2 if with_parent else 1
        # Where the output is added to the residual stream: that of both, and the parent's output.
        residual = with_parent and name in self.residual
        inputs = self.batch * (K * (1 + fp8) + (3 * N if residual else K * with_parent))
        beside = self.beside() if with_parent else 0
        return (
            held
            + beside
            + max(self.forward() + FLOAT * inputs * (streams - 1) // 2, FLOAT * (K * K + inputs))
        )

    def weighing(self) -> int:
        """Bytes of the attention scores that tokens are weighed by, and of what is made of them."""
        return 3 * FLOAT * min(SCORES, self.heads * min(self.window, QUERIES) * self.window)

    def standing(self) -> int:
        """Bytes at most of passes of the whole text that stand still in the block."""
        values = standing(
            self.linears, self.groups, self.routed, self.stops, self.stream or self.hidden
        )
        return self.itemsize * self.tokens * values

    def profiling(self) -> int:
        """Bytes at most while a pass records the inputs of all groups of
        linears at once, for the report.

        Routed experts that share a role see each token a few times between them.
        """
        widths: dict[str, list[int]] = {}
        for name in (group[0] for group in self.groups):
            kind = name.rpartition(".")[2] if name in self.routed else name
            widths.setdefault(kind, []).append(self.linears[name][1])
        K = sum(sum(same[:_VISITS]) for same in widths.values())
        widest = max(max(same) for same in widths.values())
        recorded = self.itemsize * self.batch * K
        copies = FLOAT * self.batch * K if self.itemsize < FLOAT else 0
        return recorded + max(self.forward(), copies + (2 * FLOAT + 1) * self.batch * widest)


def standing(
    linears: Mapping[str, tuple[int, int]],
    groups: Sequence[Sequence[str]],
    routed: Collection[str],
    stops: Collection[str],
    width: int,
) -> int:
    """Values at most that a pass holds for each of its tokens while it stands before a linear.

    Those are, behind the first linears, hidden states before and behind a norm; what the linears
    before it returned, unless that was made one (gate and up); and what it is about to get. Of
    experts, what enters them all. What entered the block is held anyway.
    stops: first linears of the groups that passes wait before.
    """
    most, before, states = 0, 0, 0
    for group in groups:
        inputs, outputs = linears[group[0]][1], sum(linears[name][0] for name in group)
        if group[0] in routed:
            most = max(most, 4 * width if group[0] in stops else 0)
            continue
        if group[0] in stops:
            most = max(most, states + inputs + (before if before != 2 * inputs else 0))
        before, states = outputs, 2 * width
    return most


ROUTED_BYTES = 1 << 30
"""Most bytes of the moments of routed experts that are measured in one pass: more spare passes over
the text, and raise the peak of a conversion."""


WELL_CONDITIONED = 0.1
"""Damping, as a part of the mean diagonal, from which on a Hessian is factored in float32: its largest
eigenvalue is at most K times that mean and its least one at least what was added, so that none is too
ill-conditioned, and it takes half the time."""


def factoring(K: int, damping: float) -> int:
    """Bytes of the factorization of a Hessian [K, K] under so much damping, beside it: in place, and
    for the lower precision of the factor a copy where it was made in float64."""
    matrices = FLOAT if damping >= WELL_CONDITIONED else 3 * FLOAT
    return matrices * K * K + FLOAT * min(SOLVER_ROWS, K) * K
