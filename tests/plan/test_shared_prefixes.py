"""Prefix caches of engines that share GPUs: as without sharing where there is one, bounded, or told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantize.plan.answer import as_json
from quantize.plan.gpus import gpu_named
from quantize.plan.request import Request, parse_request
from quantize.plan.served import dense
from quantize.plan.shared import WHOLE, again
from quantize.plan.sharing import plan_of
from quantize.plan.simulate.prefixes import Cached
from quantize.report.plan import plan_report

MODELS = {name: dense(name, 24, 2048, 16, 4, 128, 5632, 32000) for name in ("a", "b")}
GPU = gpu_named("l40s")


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Talks of five turns each, whose prompts begin with all that was said before."""
    draw = np.random.default_rng()
    rows = []
    for talk in range(60):
        begun, said = float(draw.uniform(0, 40)), 0
        for _ in range(5):
            tokens = said + int(draw.integers(100, 900))
            blocks = [hash((talk, k)) for k in range(-(-tokens // 512))]
            begun += float(draw.exponential(6.0))
            rows.append((begun, tokens, int(draw.integers(1, 80)), blocks))
            said = tokens
    lines = [
        f'{{"timestamp": {1e3 * t}, "input_length": {i}, "output_length": {o}, "hash_ids": {ids}}}'
        for t, i, o, ids in rows
    ]
    path = tmp_path_factory.mktemp("traces") / "turns.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def asked(trace: Path, names: str, memory: str | None, more: str = "") -> Request:
    models = "\n".join(
        f"  - {{model: org/{name}, trace: {trace}, ttft: 0.8, tpot: 0.06, tp: 1{more}}}"
        for name in names
    )
    text = f"models:\n{models}\ncluster:\n  - {{gpu: l40s, gpus: 4}}\n"
    return parse_request(text + (f"sharing: {{memory: {memory}}}\n" if memory else ""), "f.yaml")


def test_with_the_whole_gpu_a_cache_finds_what_one_alone_does(turns: Path):
    shared = plan_of(asked(turns, "a", "shares"), MODELS)
    alone = plan_of(asked(turns, "a", None), MODELS)
    assert shared.gpus == alone.gpus == 1
    one, other = (plan.chosen["a"].simulated for plan in (shared, alone))
    assert one is not None
    assert other is not None
    assert one.outcome.hit_rate > 0.3
    assert one.outcome.hit_rate == pytest.approx(other.outcome.hit_rate, rel=1e-9)
    np.testing.assert_allclose(one.outcome.first, other.outcome.first, rtol=1e-9)
    found = as_json(shared)
    assert found["models"][0]["chosen"]["simulated"]["prefix_hit_rate"] == one.outcome.hit_rate
    assert found["shared"]["prefix_cache"] is True


def test_a_part_of_the_gpu_holds_less(turns: Path):
    both = plan_of(asked(turns, "ab", "shares"), MODELS).shared
    assert both is not None
    assert both.cluster.gpus == 1
    for i, (_, memory) in enumerate(both.setups):
        assert isinstance(memory, Cached)
        used = both.outcome.samples_of(i)["used"]
        assert 0 < used.max() <= memory.blocks
        assert both.kv_used(i, float(used.max())) <= both.kv(i)
        assert memory.held() == (0, 0)  # all are answered, and what they left is nobody's
        assert 0 < memory.idle_blocks <= memory.blocks
    assert sum(map(both.kv, (0, 1))) + sum(map(both.held, (0, 1))) <= both.cluster.memory
    # The same requests a hundred times as fast find what was said before still there or not yet said.
    assert again(asked(turns, "ab", "shares"), both, 0.5).outcome.hit_rate > 0.3


def test_without_a_cache_all_is_computed(turns: Path):
    kept = plan_of(asked(turns, "a", "shares"), MODELS).shared
    none = plan_of(asked(turns, "a", "shares", ", prefix_cache: false"), MODELS).shared
    assert kept is not None
    assert none is not None
    assert none.outcome.hit_rate == 0.0
    assert none.outcome.ttft.mean() > kept.outcome.ttft.mean()
    assert not none.whole  # as asked


def test_slabs_say_that_they_keep_none(turns: Path):
    plan = plan_of(asked(turns, "a", "slabs"), MODELS)
    assert plan.shared is not None
    assert plan.shared.whole
    assert as_json(plan)["shared"]["prefix_cache"] is False
    page = plan_report(plan, "1")
    assert WHOLE in page.warnings
    (table,) = next(section for section in page.sections if section.id == "binds").items
    (row,) = table.rows  # type: ignore[union-attr]
    assert row[0] == "a"
    assert row[3] in ("ttft", "tpot", "memory", "nothing")
    assert row[1] >= 1.0  # what is asked for is met
