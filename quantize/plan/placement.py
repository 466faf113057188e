"""Which replica goes on which GPUs: FineServe's rule, Prism's, and the best there is.

FineServe's global scheduler (arXiv 2509.06261 and its placement_optimizer.py) without its faults: a
shard takes weights/tp of each GPU, a replica that has no place is reported, and the best score counts
even if it is negative.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import optimize, sparse

from quantize.errors import UsageError
from quantize.plan.demand import Demand, Option, options, short_of

WEIGHT_ROOM = 1.3
"""FineServe counts weights so many times, for activations."""
VISITS = 20_000
"""Steps of a search through all placements, about a second, before it is given up for a program."""
EXHAUSTIVE = 8
"""GPUs up to which every placement is looked at."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs; GPU g stands in node g // per_node."""

    gpus: int
    memory: int
    """Bytes of one GPU for weights and KV."""
    per_node: int = 8

    def nodes(self) -> Iterator[range]:
        """GPUs of each node."""
        for start in range(0, self.gpus, self.per_node):
            yield range(start, min(start + self.per_node, self.gpus))


@dataclass(frozen=True)
class Replica:
    """One engine and where it runs."""

    demand: Demand
    option: Option
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Replicas with their GPUs, and demands for which there was no place, with the reason."""

    replicas: tuple[Replica, ...]
    unplaced: tuple[str, ...] = ()

    def load(self, cluster: Cluster) -> list[float]:
        """Load of each GPU: the sum of its replicas'."""
        made = [0.0] * cluster.gpus
        for replica in self.replicas:
            for gpu in replica.gpus:
                made[gpu] += replica.option.load
        return made

    def free(self, cluster: Cluster) -> list[int]:
        """Bytes of each GPU that weights leave."""
        made = [cluster.memory] * cluster.gpus
        for replica in self.replicas:
            for gpu in replica.gpus:
                made[gpu] -= replica.option.shard.weights
        return made


@dataclass
class _State:
    """GPUs while they are filled."""

    cluster: Cluster
    free: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    pressure: list[float] = field(default_factory=list)
    options: list[list[Option]] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = self.cluster.gpus
        self.free = [float(self.cluster.memory)] * n
        self.weights, self.pressure = [0.0] * n, [0.0] * n
        self.options = [[] for _ in range(n)]


Rule = Callable[[_State, Demand, Option, Sequence[int]], float]
"""The lower, the better these GPUs are for one replica."""


def fineserve(demands: Sequence[Demand], cluster: Cluster) -> Placement:
    """Largest need first, each where most blocks stay free: need is 1.3 · weights and the KV of the
    batch; blocks are of the harmonic mean of those that live there."""

    def score(state: _State, demand: Demand, option: Option, gpus: Sequence[int]) -> float:
        total = 0.0
        for gpu in gpus:
            kinds = [other.shard.kind for other in (*state.options[gpu], option)]
            mean = len(kinds) / sum(1 / (kind.block_bytes * kind.parts) for kind in kinds)
            total += math.floor((state.free[gpu] - _need(demand, option)) / mean)
        return -total

    def largest(chosen: tuple[Demand, Option]) -> float:
        return -_need(*chosen) * chosen[1].shard.tp

    return _greedy(demands, cluster, largest, score, lambda found: found[0])


def prism(demands: Sequence[Demand], cluster: Cluster) -> Placement:
    """Most rate per goal first, each where rate per goal over free memory is least; the fewest GPUs
    that hold a model are its tp."""

    def score(state: _State, demand: Demand, option: Option, gpus: Sequence[int]) -> float:
        own = demand.rate / option.dp / (demand.ttft * option.shard.tp)
        total = 0.0
        for gpu in gpus:
            left = cluster.memory - state.weights[gpu] - option.shard.weights
            total += (state.pressure[gpu] + own) / left if left > 0 else math.inf
        return total

    def hurried(chosen: tuple[Demand, Option]) -> float:
        return -chosen[0].rate / (chosen[0].ttft * chosen[1].shard.tp)

    def smallest(found: Sequence[Option]) -> Option:
        return min(found, key=lambda option: option.shard.tp)

    return _greedy(demands, cluster, hurried, score, smallest)


def best(demands: Sequence[Demand], cluster: Cluster, exhaustive: bool | None = None) -> Placement:
    """Choose the placement whose fullest GPU has the least load, then the fewest bytes of weights.

    Weights and the KV of each batch must fit. Up to 8 GPUs the best of all is found: all are looked
    at, or, where they are too many, an integer program over all groups of GPUs is solved. Beyond
    that, or with exhaustive=False, it is one over aligned groups. Where not all have a
    place, those are left out, one after the other, that have no option or need most.
    """
    left, unplaced = _choices(demands, cluster)
    small = cluster.gpus <= EXHAUSTIVE if exhaustive is None else exhaustive
    while left:
        found = _exact(left, cluster) if small else _program(left, cluster)
        if found is not None:
            return replace(found, unplaced=tuple(unplaced))
        last = max(left, key=lambda item: min(_need(item[0], o) * o.gpus for o in item[1]))
        left.remove(last)
        unplaced.append(f"{last[0].name}: no GPU has the memory left beside the others")
    return Placement((), tuple(unplaced))


def _need(demand: Demand, option: Option) -> float:
    """Bytes on each GPU, as FineServe reckons."""
    return WEIGHT_ROOM * option.shard.weights + option.kv_bytes(demand.tokens)


def _choices(
    demands: Sequence[Demand], cluster: Cluster
) -> tuple[list[tuple[Demand, tuple[Option, ...]]], list[str]]:
    found, unplaced = [], []
    for demand in demands:
        made = tuple(
            option
            for option in options(demand, cluster.memory, cluster.gpus)
            if option.shard.tp <= min(cluster.per_node, cluster.gpus)
        )
        if made:
            found.append((demand, made))
        else:
            unplaced.append(short_of(demand, cluster.memory, cluster.gpus))
    return found, unplaced


def _greedy(
    demands: Sequence[Demand],
    cluster: Cluster,
    order: Callable[[tuple[Demand, Option]], float],
    rule: Rule,
    choice: Callable[[Sequence[Option]], Option],
) -> Placement:
    found, unplaced = _choices(demands, cluster)
    chosen = sorted(((demand, choice(made)) for demand, made in found), key=order)
    state, replicas = _State(cluster), []
    for demand, option in chosen:
        for _ in range(option.dp):
            places = list(_places(state, option))
            if not places:
                unplaced.append(f"{demand.name}: no GPU has the memory left for its weights")
                break
            gpus = min(places, key=lambda where: (rule(state, demand, option, where), where))
            for gpu in gpus:
                state.free[gpu] -= _need(demand, option)
                state.weights[gpu] += option.shard.weights
                state.pressure[gpu] += demand.rate / option.dp / (demand.ttft * option.shard.tp)
                state.options[gpu].append(option)
            replicas.append(Replica(demand, option, gpus))
    return Placement(tuple(replicas), tuple(unplaced))


def _places(state: _State, option: Option) -> Iterable[tuple[int, ...]]:
    for node in state.cluster.nodes():
        room = [
            gpu for gpu in node if state.cluster.memory - state.weights[gpu] > option.shard.weights
        ]
        yield from itertools.combinations(room, option.shard.tp)


def _bytes(demand: Demand, option: Option) -> int:
    return option.shard.weights + option.kv_bytes(demand.tokens)


class _TooMany(Exception):  # noqa: N818 - no error
    """More placements than are looked at one by one."""


def _exact(
    items: Sequence[tuple[Demand, tuple[Option, ...]]], cluster: Cluster
) -> Placement | None:
    try:
        return _search(items, cluster)
    except _TooMany:
        return _program(items, cluster, aligned=False)


def _search(
    items: Sequence[tuple[Demand, tuple[Option, ...]]], cluster: Cluster
) -> Placement | None:
    """All placements, those left out that cannot be better or are alike but for the GPUs' numbers."""
    # Those that fill most go first, so that what does not fit is seen early.
    queue = sorted(items, key=lambda item: -max(_bytes(item[0], o) * o.gpus for o in item[1]))
    least = [min(o.load * o.gpus for o in made) / cluster.gpus for _, made in queue]
    rest = [sum(least[i:]) for i in range(len(least) + 1)]
    found: list[tuple[tuple[float, int], tuple[Replica, ...]]] = []
    load, free = [0.0] * cluster.gpus, [cluster.memory] * cluster.gpus
    placed: list[Replica] = []
    visits = itertools.count()

    def visit(i: int, option: Option | None, missing: int, after: tuple[int, ...]) -> None:
        if next(visits) > VISITS:
            raise _TooMany
        bound = max(max(load), sum(load) / cluster.gpus + rest[min(i + 1, len(queue))])
        if found and bound > found[0][0][0] + 1e-12:
            return
        if option is None or missing == 0:
            if option is not None:
                i += 1
            if i == len(queue):
                score = (max(load), sum(r.option.shard.weights * len(r.gpus) for r in placed))
                if not found or score < found[0][0]:
                    found[:] = [(score, tuple(placed))]
                return
            for option in queue[i][1]:
                visit(i, option, option.dp, ())
            return
        demand, seen = queue[i][0], set()
        size = _bytes(demand, option)
        for node in cluster.nodes():
            for gpus in itertools.combinations(
                [g for g in node if free[g] >= size], option.shard.tp
            ):
                if gpus < after:
                    continue  # replicas are alike: their order does not matter
                # GPUs in equal states are alike, and so are nodes of which the same is left.
                state = sorted((load[g], free[g], g in gpus) for g in node)
                if (alike := tuple(state)) in seen and not after:
                    continue
                seen.add(alike)
                for g in gpus:
                    load[g] += option.load
                    free[g] -= size
                placed.append(Replica(demand, option, gpus))
                visit(i, option, missing - 1, gpus)
                placed.pop()
                for g in gpus:
                    load[g] -= option.load
                    free[g] += size

    visit(0, None, 0, ())
    return Placement(found[0][1]) if found else None


def _groups(node: range, tp: int, aligned: bool) -> Iterator[tuple[int, ...]]:
    """Groups of tp GPUs of a node: all, or those of neighbours that begin at a multiple of tp."""
    if not aligned:
        yield from itertools.combinations(node, tp)
        return
    for start in range(0, len(node) - tp + 1, tp):
        yield tuple(node[start : start + tp])


def _program(
    items: Sequence[tuple[Demand, tuple[Option, ...]]], cluster: Cluster, aligned: bool = True
) -> Placement | None:
    """The same as an integer program: how many replicas of each option stand on each group."""
    columns = [
        (d, option, gpus)
        for d, (_, made) in enumerate(items)
        for option in made
        for node in cluster.nodes()
        for gpus in _groups(node, option.shard.tp, aligned)
    ]
    chosen = [(d, option) for d, (_, made) in enumerate(items) for option in made]
    n, m, goal = len(columns), len(chosen), len(columns) + len(chosen)
    rows, low, high = [], [], []

    def add(entries: dict[int, float], least: float, most: float) -> None:
        rows.append(entries)
        low.append(least)
        high.append(most)

    for gpu in range(cluster.gpus):
        here = [(c, d, option) for c, (d, option, gpus) in enumerate(columns) if gpu in gpus]
        used = {c: _bytes(items[d][0], option) / cluster.memory for c, d, option in here}
        add(used, -np.inf, 1.0)
        add({**{c: option.load for c, _, option in here}, goal: -1.0}, -np.inf, 0.0)
    for k, (d, option) in enumerate(chosen):  # all replicas of the chosen option, none of others
        own = {c: 1.0 for c, (e, o, _) in enumerate(columns) if e == d and o is option}
        add({**own, n + k: -float(option.dp)}, 0.0, 0.0)
    for d in range(len(items)):
        add({n + k: 1.0 for k, (e, _) in enumerate(chosen) if e == d}, 1.0, 1.0)
    matrix = sparse.lil_matrix((len(rows), goal + 1))
    for row, entries in enumerate(rows):
        for column, value in entries.items():
            matrix[row, column] = value
    cost = np.zeros(goal + 1)
    cost[goal] = 1.0
    for k, (_, option) in enumerate(chosen):  # only decides between equals
        cost[n + k] = 1e-6 * option.gpus * option.shard.weights / cluster.memory
    upper = np.array([float(o.dp) for _, o, _ in columns] + [1.0] * m + [np.inf])
    integral = np.array([1] * (n + m) + [0])
    done = optimize.milp(
        cost,
        constraints=optimize.LinearConstraint(matrix.tocsr(), low, high),
        integrality=integral,
        bounds=optimize.Bounds(0, upper),
        options={"time_limit": 30.0},
    )
    if done.x is None:
        if done.status == 2:  # infeasible
            return None
        raise UsageError(f"placement: the integer program was not solved ({done.message})")
    replicas = [
        Replica(items[d][0], option, gpus)
        for (d, option, gpus), count in zip(columns, np.rint(done.x[:n]).astype(int), strict=True)
        for _ in range(count)
    ]
    return Placement(tuple(replicas))
