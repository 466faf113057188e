"""Policies against formulas written out again, batches against what they must be, and the fit."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from quantize.draft.fit import difference, fit, signals
from quantize.draft.policies import Costs, Story, play, play_batch, stories
from quantize.draft.prompts import Prompt
from quantize.draft.replay import replay
from quantize.draft.rollout import Rollout
from quantize.draft.trace import COLUMNS, Trace
from quantize.errors import UsageError
from quantize.serving.speculation.dsde import PAPER, PUBLISHED_CODE, stability
from quantize.serving.speculation.fitted import Fitted
from quantize.serving.speculation.names import NAMED, policy_named
from quantize.serving.speculation.policy import (
    AdaEdl,
    Confidence,
    Heuristic,
    Round,
    Signal,
    Static,
)


def story(outcomes: list[bool], confidence: float = 0.9) -> Story:
    n = len(outcomes)
    signal = Signal(0.1, confidence, confidence - 0.05)
    return Story(0, np.array(outcomes), (signal,) * n, (0.1,) * n, 0.0)


def made(accept: list[np.ndarray], margin: list[np.ndarray], temperature: float = 0.0) -> Trace:
    """A trace whose acceptance goes with the draft's margin, as much as the caller says."""
    columns = {name: [np.full(len(a), 0.5) for a in accept] for name in COLUMNS}
    columns |= {"accept": accept, "margin": margin, "overlap": accept, "top1": accept}
    columns["kl"] = [0.1 + 0.05 * np.random.default_rng(1).random(len(a)) for a in accept]
    prompts = tuple(Prompt("x", (0,)) for _ in accept)
    zeros = [np.zeros(len(a), np.int64) for a in accept]
    rollout = Rollout(temperature, prompts, tuple(tuple([0] * len(a)) for a in accept))
    return Trace(rollout, columns, zeros, zeros)


def variance(values: list[float], decay: float) -> float:
    w = decay ** np.arange(len(values) - 1, -1, -1)
    m = np.average(values, weights=w)
    return float(np.average((np.array(values) - m) ** 2, weights=w))


def test_stability_is_the_ratio_of_weighted_variances():
    values = np.random.default_rng().random(40).tolist()
    assert stability(values, PAPER) == pytest.approx(
        variance(values[-10:], 0.85) / variance(values[-30:], 0.85)
    )
    assert stability(values[:31], PUBLISHED_CODE) == pytest.approx(
        variance(values[21:31], 0.9) / variance(values[:31], 0.9)
    )
    assert stability([0.3] * 12, PAPER) == 20  # nothing scatters: the code's own stand-in
    assert stability([0.3], PAPER) == 0


def test_dsde_warms_up_and_then_goes_by_its_formula():
    state = PAPER.start()
    assert state.length() == 2
    rng = np.random.default_rng(5)
    history: deque[float] = deque(maxlen=30)
    for accepted, drafted in ((2, 2), (4, 4), (8, 8)):
        kl = rng.uniform(0.01, 0.2, drafted).tolist()
        history.extend(kl)
        state.learn(Round(drafted, accepted, kl=kl))
    assert state.length() == 16  # doubled each time
    warm = list(history)
    kl = rng.uniform(0.01, 0.2, 16).tolist()
    state.learn(Round(16, 15, kl=kl))
    warm += kl
    history.extend(kl)
    top = min(20, max(2, round(15 * (1 + np.mean(warm) / max(warm)))))
    low = max(2, math.ceil(top / 10))
    damped = math.expm1(2 * np.mean(kl)) * stability(list(history), PAPER)
    wanted = low if damped > 1 else max(low, math.ceil((1 - damped) * (top - low) + low))
    assert state.length() == wanted


def test_dsde_divides_by_the_temperature_and_falls_to_its_least():
    lengths = []
    for temperature in (0.5, 2.0):
        state = PAPER.start()
        values = np.random.default_rng(2).uniform(0, 0.3, 40).tolist()
        state.learn(Round(40, 39, kl=values, temperature=temperature))
        lengths.append(state.length())
    assert lengths[0] < lengths[1]
    state.learn(Round(2, 0, kl=[50.0, 50.0], temperature=1.0))
    assert state.length() == 2


def test_presets_differ_behind_a_rejected_token():
    values = [0.1] * 10 + [9.0] * 30
    paper, code = PAPER.start(), PUBLISHED_CODE.start()
    for state in (paper, code):
        state.learn(Round(40, 9, kl=values))
    assert list(paper.values) == values[:10]
    assert len(code.values) == 40


def test_plain_policies():
    state = Heuristic(5).start()
    state.learn(Round(5, 5))
    assert state.length() == 7
    state.learn(Round(7, 6))
    assert state.length() == 6
    assert not Confidence(0.4).start().goes_on([Signal(1.0, 0.39, 0.1)])
    edl = AdaEdl().start()
    assert edl.goes_on([Signal(0.36 / 0.2 - 0.01, 0.5, 0)])
    assert not edl.goes_on([Signal(0.36 / 0.2 + 0.01, 0.5, 0)])
    for _ in range(200):
        edl.learn(Round(4, 0))
    assert not edl.goes_on([Signal(1.0, 0.5, 0)])  # what was fine is so no longer


@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_playing_a_static_length_is_its_replay(gamma: int):
    rng = np.random.default_rng()
    accept = [(rng.random(60) < 0.8).astype(float) for _ in range(4)]
    played = play(Static(gamma), stories(made(accept, accept)))
    found = replay(accept, gamma)
    assert played.steps.tolist() == found.steps.tolist()
    assert played.drafted.tolist() == found.drafted.tolist()


def test_nothing_beats_the_oracle_and_it_wastes_nothing():
    rng = np.random.default_rng()
    accept = [(rng.random(120) < 0.85).astype(float) for _ in range(3)]
    told = stories(made(accept, accept))
    costs = Costs(0.4)
    best = play(None, told)
    assert best.drafted.sum() == best.tokens.sum() - best.steps.sum()
    for policy in (*NAMED, Static(2), Static(6)):
        assert play(policy, told).speed_up(costs).value <= best.speed_up(costs).value + 1e-12


def test_a_batch_of_one_is_no_batch_and_many_wait():
    rng = np.random.default_rng(3)
    accept = [(rng.random(100) < 0.8).astype(float) for _ in range(20)]
    told = stories(made(accept, accept))
    costs = Costs(0.3)
    alone = play(Static(3), told).speed_up(costs).value
    one = play_batch(Static(3), told, 1, costs, tokens=20000)
    assert one.speed_up == pytest.approx(alone, rel=0.03)
    heuristic = Heuristic(4)
    narrow, wide = (play_batch(heuristic, told, b, costs, tokens=6000) for b in (1, 16))
    assert wide.longest > wide.drafted_per_step * 1.3  # stragglers
    assert wide.speed_up < narrow.speed_up


def test_the_cap_holds_back_the_longest():
    rng = np.random.default_rng(3)
    accept = [(rng.random(100) < p).astype(float) for p in np.linspace(0.3, 0.98, 20)]
    told = stories(made(accept, accept))
    capped = play_batch(PAPER, told, 16, Costs(0.3), tokens=6000)
    free = play_batch(
        type(PAPER)(**(PAPER.__dict__ | {"capped": False})), told, 16, Costs(0.3), tokens=6000
    )
    assert capped.longest < free.longest


def test_time_of_a_step_is_that_of_its_longest_draft():
    assert Costs(0.5, 1.0, 0.1).step([1, 4, 0]) == pytest.approx(1 + 0.1 * 5 / 3 + 2)


def test_a_fitted_policy_wins_where_margins_tell_and_only_there():
    rng = np.random.default_rng(4)
    margins = [rng.random(150) for _ in range(16)]
    told = [(m > 0.2).astype(float) for m in margins]
    found = fit(made(told, margins), Costs(0.4))
    assert found is not None
    assert found.wins
    assert found.fitted_speed_up.value > 1.1 * found.static_speed_up.value
    blind = fit(made(told, [rng.random(150) for _ in range(16)]), Costs(0.4))
    assert blind is not None
    assert not blind.wins
    assert fit(made(told[:4], margins[:4]), Costs(0.4)) is None
    table = signals(made(told, margins))
    assert table["draft's margin"][0] > 0.5
    assert abs(table["position"][0]) < 0.2


def test_difference_of_a_policy_to_itself_is_nothing():
    told = stories(made([np.ones(50)] * 3, [np.ones(50)] * 3))
    played = play(Static(2), told)
    assert difference(played, played, Costs(0.5)).value == 0


def test_policies_go_through_files(tmp_path: Path):
    policy = Fitted((0.1, 1.0, -0.5, 2.0, 0.3), 0.5, 1.4, 0.9)
    file = tmp_path / "policy.json"
    file.write_text(policy.to_json())
    assert policy_named(f"fitted:{file}") == policy
    file.write_text(json.dumps(json.loads(policy.to_json()) | {"features": ["constant"]}))
    with pytest.raises(UsageError, match="features must be constant, log_odds"):
        policy_named(f"fitted:{file}")
    with pytest.raises(UsageError, match="No such file"):
        policy_named("fitted:/nowhere.json")


def test_drafting_ends_where_it_does_not_pay():
    hopeless = Fitted((0.0, 0.0, 0.0, 0.0, 0.0), cost=0.9, rate=1.0, mean=0.3)
    assert hopeless.start().length() == 0
    played = play(hopeless, [story([False] * 10)])
    assert played.drafted.sum() == 0
    assert played.steps.sum() == 10
