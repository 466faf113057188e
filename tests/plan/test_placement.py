"""Placements against every one there is, and the rules on cases where they are known to differ."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from quantize.plan.demand import Demand, Option, Shard, options, prefill_seconds, throughput
from quantize.plan.gpus import GPUS
from quantize.plan.placement import Cluster, Placement, best, fineserve, prism
from quantize.plan.served import dense
from quantize.plan.simulate.costs import StepCosts, model_costs
from quantize.plan.simulate.placed import Serving, engines
from quantize.plan.simulate.requests import merged, poisson
from quantize.plan.simulate.run import simulate
from quantize.plan.slabs import KvFormat, paper_pools

GIB = 2**30
H100 = next(gpu for gpu in GPUS if gpu.name == "h100-sxm")
LLAMA = dense("8b", 32, 4096, 32, 8, 128, 14336, 128256)


def llama(name: str, rate: float, ttft: float = 1.0, sizes: tuple[int, ...] = (1, 2)) -> Demand:
    shards = {
        tp: Shard(tp, LLAMA.weights(tp), KvFormat(32768 // tp, 64), model_costs(LLAMA, H100, tp))
        for tp in sizes
    }
    return Demand(name, shards, rate, ttft, 512, 128)


def drawn(rng: np.random.Generator, name: str) -> Demand:
    """A model of which everything is drawn: weights of a few GiB, costs of a few ms."""
    weights, step = int(rng.integers(2, 9)) * GIB, float(rng.uniform(2e-3, 2e-2))
    shards = {
        tp: Shard(
            tp,
            weights // tp,
            KvFormat(int(rng.integers(4, 40)) * 1024, 64),
            StepCosts([step / tp], token=float(rng.uniform(1e-6, 2e-5)) / tp, host=1e-3),
        )
        for tp in (1, 2)
    }
    return Demand(name, shards, float(rng.uniform(1, 30)), 2.0, 200, 100)


def everything(demands: list[Demand], cluster: Cluster) -> Iterator[tuple[float, int]]:
    """(load of the fullest GPU, bytes of weights) of every placement that fits."""
    choices = [options(demand, cluster.memory, cluster.gpus) for demand in demands]
    for chosen in itertools.product(*choices):
        places = [
            itertools.combinations_with_replacement(
                [
                    gpus
                    for node in cluster.nodes()
                    for gpus in itertools.combinations(node, option.shard.tp)
                ],
                option.dp,
            )
            for option in chosen
        ]
        for where in itertools.product(*places):
            load, used, weights = [0.0] * cluster.gpus, [0] * cluster.gpus, 0
            for demand, option, groups in zip(demands, chosen, where, strict=True):
                for gpu in itertools.chain(*groups):
                    load[gpu] += option.load
                    used[gpu] += option.shard.weights + option.kv_bytes(demand.tokens)
                    weights += option.shard.weights
            if max(used) <= cluster.memory:
                yield max(load), weights


def fullest(placement: Placement, cluster: Cluster) -> float:
    return max(placement.load(cluster))


@pytest.mark.parametrize("seed", range(3))
def test_the_best_is_the_best_of_all(seed: int):
    rng = np.random.default_rng(seed)
    demands = [drawn(rng, f"m{i}") for i in range(3)]
    cluster = Cluster(3 + seed % 2, 16 * GIB, per_node=2)
    expected = min(everything(demands, cluster), default=None)
    found = best(demands, cluster)
    if expected is None:
        assert found.unplaced
        return
    assert not found.unplaced
    assert fullest(found, cluster) == pytest.approx(expected[0], rel=1e-9)
    # In nodes of two, all groups are aligned: the integer program sees the same ones.
    solved = best(demands, cluster, exhaustive=False)
    assert fullest(solved, cluster) == pytest.approx(expected[0], rel=1e-6)
    for rule in (fineserve, prism):
        other = rule(demands, cluster)
        if not other.unplaced:
            assert fullest(other, cluster) >= expected[0] * (1 - 1e-9)
    check(found, cluster)
    check(solved, cluster)


def check(placement: Placement, cluster: Cluster) -> None:
    """Memory, nodes, and as many replicas as were chosen."""
    for replica in placement.replicas:
        own = [r for r in placement.replicas if r.demand.name == replica.demand.name]
        assert len(own) == replica.option.dp
        assert all(r.option == replica.option for r in own)
        assert len(set(replica.gpus)) == replica.option.shard.tp
        assert len({gpu // cluster.per_node for gpu in replica.gpus}) == 1
    assert min(placement.free(cluster)) >= 0


def test_options_keep_goals_and_rates():
    cluster = 70 * GIB
    for option in options(llama("a", 40.0), cluster):
        demand, costs = llama("a", 40.0), option.shard.costs
        assert throughput(costs, option.batch, demand) >= 40.0 / option.dp
        assert prefill_seconds(costs, option.most, demand.input) <= demand.ttft
        assert option.load <= 1.0
    assert options(llama("a", 40.0), LLAMA.weights(2)) == ()  # no room for any sequence
    assert options(llama("a", 1.0, ttft=1e-4), cluster) == ()
    few, many = (min(o.dp for o in options(llama("a", r), cluster)) for r in (1.0, 60.0))
    assert few == 1 < many


def test_what_has_no_place_says_why():
    small = Cluster(1, 10 * GIB)
    for rule in (best, fineserve, prism):
        found = rule([llama("large", 1.0, sizes=(1,))], small)
        assert not found.replicas
        assert found.unplaced[0].startswith("large: its weights are 5.0 GiB more")
    late = best([llama("hurried", 1.0, ttft=0.01)], Cluster(1, 70 * GIB))
    assert "a prompt alone takes 0.0" in late.unplaced[0]
    fast = best([llama("asked", 4000.0)], Cluster(1, 70 * GIB))
    assert "do not keep up with 4000 requests/s" in fast.unplaced[0]
    beside = best([llama("a", 1.0, sizes=(1,)), llama("b", 1.0, sizes=(1,))], Cluster(1, 24 * GIB))
    assert len(beside.replicas) == 1
    assert "beside the others" in beside.unplaced[0]


def test_a_shard_takes_its_share_of_each_gpu():
    """FineServe's code takes all the weights from each GPU of a replica."""
    cluster = Cluster(2, 24 * GIB)
    found = fineserve([llama("a", 5.0, sizes=(2,)), llama("b", 5.0, sizes=(2,))], cluster)
    assert not found.unplaced
    assert found.free(cluster) == [cluster.memory - 2 * LLAMA.weights(2)] * 2


def test_fineserve_spreads_by_blocks_and_prism_by_pressure():
    demands = [llama(f"m{i}", 8.0, sizes=(1,)) for i in range(4)]
    cluster = Cluster(4, 70 * GIB)
    for rule in (fineserve, prism, best):
        assert sorted(r.gpus for r in rule(demands, cluster).replicas) == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize("way", ["fixed", "paper", "shares"])
def test_a_placement_is_simulated(way: str):
    demands = [llama("a", 5.0), llama("b", 20.0), llama("c", 1.0)]
    cluster = Cluster(2, 60 * GIB)
    placement = best(demands, cluster)
    how = Serving() if way == "fixed" else Serving(pools=paper_pools if way == "paper" else None)
    rng = np.random.default_rng(1)
    asked = merged([poisson(d.rate, 50, rng).for_model(i) for i, d in enumerate(demands)])
    made = simulate(asked, engines(placement, cluster, ["a", "b", "c"], how))
    assert not np.isnan(made.finish).any()
    assert made.met(1.0).mean() > 0.95
    gone = replace(placement, replicas=placement.replicas[:-1])
    lost = {r.demand.name for r in placement.replicas} - {r.demand.name for r in gone.replicas}
    if lost:
        less = simulate(asked, engines(gone, cluster, ["a", "b", "c"], how))
        assert less.dropped[asked.model == ["a", "b", "c"].index(lost.pop())].all()


def test_beyond_8_gpus_a_program_is_solved():
    rng = np.random.default_rng(7)
    demands = [drawn(rng, f"m{i}") for i in range(10)]
    cluster = Cluster(16, 16 * GIB)
    found = best(demands, cluster)
    assert not found.unplaced
    check(found, cluster)
    for rule in (fineserve, prism):
        other = rule(demands, cluster)
        assert fullest(found, cluster) <= fullest(other, cluster) + 1e-6 or other.unplaced
    assert isinstance(found.replicas[0].option, Option)
    assert math.isfinite(fullest(found, cluster))
