"""What a draft pays, what is emitted, which signals find flips."""

from __future__ import annotations

import numpy as np
import pytest
from test_policies import made

from quantize.draft.bursts import bursts, roc_area
from quantize.draft.emit import (
    accepted_at,
    length_notes,
    lengths_by_batch,
    serve_line,
    speculative_config,
)
from quantize.draft.figures import GAMMAS, Length, Sampling
from quantize.draft.pays import GivenCost, Pay, Place, check_seconds, pays, room, times
from quantize.draft.replay import Interval, independent
from quantize.errors import UsageError
from quantize.plan.gpus import gpu_named
from quantize.plan.latency import StepTime
from quantize.plan.served import dense

PARENT = dense("8b", 32, 4096, 32, 8, 128, 14336, 128256)
DRAFT = dense("8b-w4", 32, 4096, 32, 8, 128, 14336, 128256, weight_bits=4.125)
PLACE = Place(gpu_named("h100"))


def sampling(alpha: float) -> Sampling:
    lengths = tuple(
        Length(g, Interval(independent(alpha, g)), Interval(alpha), g, None) for g in GAMMAS
    )
    return Sampling(1.0, 8, 1000, None, None, None, None, lengths, ())


def test_a_w4_copy_of_8b_pays_less_the_more_sequences_there_are():
    by_batch = {b: times(PARENT, DRAFT, PLACE, b) for b in (1, 8, 32, 128)}
    found = pays(sampling(0.95), by_batch, room(PARENT, DRAFT, PLACE).sequences)
    # serving.md B4: c .53, 1.45 x at α .95
    assert found[0].cost == pytest.approx(0.53, abs=0.02)
    assert found[0].speed_up.value == pytest.approx(1.45, abs=0.03)
    speeds = [pay.speed_up.value for pay in found]
    assert speeds == sorted(speeds, reverse=True)
    assert [pay.fits for pay in found] == [True, True, True, False]
    for pay in found:
        low, high = pay.speed_up.low, pay.speed_up.high
        assert low is not None and low < pay.speed_up.value  # noqa: PT018
        assert high is not None and high > pay.speed_up.value  # noqa: PT018


def test_a_step_of_one_token_is_a_plain_step():
    parent = StepTime(PARENT, PLACE.gpu, 1)
    for batch in (1, 64):
        plain = times(PARENT, DRAFT, PLACE, batch).plain
        assert check_seconds(parent, PLACE, batch, 1) == pytest.approx(plain)
    # so many tokens that multiplying takes longer than reading
    assert check_seconds(parent, PLACE, 128, 9) > 1.4 * times(PARENT, DRAFT, PLACE, 128).plain


def test_costs_give_back_the_step_that_they_were_taken_from():
    t = times(PARENT, DRAFT, PLACE, 128)
    assert t.costs(4).step([4] * 128) * t.plain == pytest.approx(t.speculative(4))
    assert GivenCost(0.3).costs(4).step([4]) == GivenCost(0.3).speculative(4)


def test_no_length_is_best_where_none_pays():
    found = pays(sampling(0.3), {1: GivenCost(0.9)})
    assert found[0].gamma == 0
    assert found[0].speed_up.value < 1


def test_a_self_copy_halves_the_sequences_and_lookup_takes_none():
    space = room(PARENT, DRAFT, PLACE)
    assert space.kv_token == space.parent_kv_token == 2 * 8 * 128 * 2 * 32
    assert 0.35 < space.sequences / space.parent_sequences < 0.5
    assert room(PARENT, None, PLACE).sequences == space.parent_sequences
    assert times(PARENT, None, PLACE, 1).draft == 0


def test_config_says_probabilistic_and_lengths_by_batch(tmp_path):
    paid = [Pay(b, 0.5, g, Interval(1.2), True) for b, g in ((1, 5), (8, 5), (32, 3), (128, 0))]
    ranges, most = lengths_by_batch(paid)
    assert ranges == [(1, 8, 5), (9, 32, 3), (33, 1 << 20, 1)]
    config = speculative_config(tmp_path, most, by_batch=ranges)
    assert config == {
        "method": "draft_model",
        "model": str(tmp_path),
        "num_speculative_tokens": 5,
        "draft_sample_method": "probabilistic",
        "num_speculative_tokens_per_batch_size": [[1, 8, 5], [9, 32, 3], [33, 1 << 20, 1]],
    }
    other = speculative_config(tmp_path, 2, same_vocabulary=False)
    assert other["use_heterogeneous_vocab"] is True
    assert "draft_sample_method" not in other
    assert speculative_config(None, 4)["method"] == "ngram"
    with pytest.raises(UsageError, match="nothing to emit"):
        speculative_config(tmp_path, 0)
    assert "--tensor-parallel-size 2" in serve_line("p", config, 2)


def test_lengths_to_heed_are_told():
    (alike,) = length_notes(4, 1024, 1024)
    assert "--max-model-len 8 tokens above" in alike
    assert length_notes(4, None, 1024) == [alike]
    _, shorter = length_notes(4, 512, 1024)
    assert "longer than 504" in shorter


def test_acceptance_by_position_is_of_all_steps():
    constant = accepted_at([np.full(5000, 0.7)], 3)
    assert constant == pytest.approx([0.7, 0.49, 0.343], abs=1e-9)
    # period 3: accepted, accepted, rejected; each step accepts two and adds the third
    assert accepted_at([np.array([1.0, 1.0, 0.0] * 50)], 4) == [1, 1, 0, 0]


def test_area_is_the_chance_of_the_larger_value():
    rng = np.random.default_rng()
    values, wrong = rng.integers(0, 6, 80).astype(float), rng.random(80) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in values[wrong] for b in values[~wrong]]
    assert roc_area(values, wrong) == pytest.approx(np.mean(pairs))


def test_bursts_find_what_goes_with_flips():
    rng = np.random.default_rng(6)
    right = [(rng.random(80) > 0.2).astype(float) for _ in range(6)]
    told = made(right, [0.1 + 0.5 * r for r in right])
    found = bursts(told, told)
    by_name = {d.name: d for d in found.detectors}
    assert by_name["draft's small margin"].area == 1
    assert by_name["draft's small margin"].precision == 1
    assert by_name["WVIR"].area == pytest.approx(0.5, abs=0.15)
    assert found.flips == pytest.approx(1 - np.concatenate([r[10:] for r in right]).mean())
    assert found.cache_correlation == pytest.approx(1)
    assert len(found.curves["wvir"]) == 80
