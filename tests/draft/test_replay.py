"""Replay against brute force, and prompt lookup against transformers'."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from quantize.draft.lookup import candidates, replay_lookup
from quantize.draft.prompts import Prompt
from quantize.draft.replay import independent, ratio, replay, whole_steps
from quantize.draft.rollout import Rollout


def walk(outcomes: tuple[bool, ...], gamma: int) -> tuple[int, int]:
    """Steps and drafted tokens where it is known which tokens are accepted."""
    done = steps = drafted = 0
    while done < len(outcomes):
        most = min(gamma, len(outcomes) - done - 1)
        accepted = 0
        while accepted < most and outcomes[done + accepted]:
            accepted += 1
        steps, drafted, done = steps + 1, drafted + most, done + accepted + 1
    return steps, drafted


@pytest.mark.parametrize("gamma", [1, 2, 3, 9])
def test_replay_is_the_mean_over_all_outcomes(gamma: int):
    chances = np.random.default_rng(gamma).random(8)
    steps = drafted = 0.0
    for outcomes in itertools.product([False, True], repeat=8):
        weight = math.prod(c if o else 1 - c for c, o in zip(chances, outcomes, strict=True))
        s, d = walk(outcomes, gamma)
        steps, drafted = steps + weight * s, drafted + weight * d
    found = replay([chances], gamma)
    assert found.steps[0] == pytest.approx(steps, abs=1e-12)
    assert found.drafted[0] == pytest.approx(drafted, abs=1e-12)


def test_known_outcomes_are_walked():
    rng = np.random.default_rng()
    texts = [rng.random(50) < 0.8 for _ in range(5)]
    found = replay([text.astype(float) for text in texts], 4)
    walked = [walk(tuple(text), 4) for text in texts]
    assert found.steps.tolist() == [s for s, _ in walked]
    assert found.per_step.value == pytest.approx(250 / sum(s for s, _ in walked))
    assert found.drafted_per_step == pytest.approx(
        sum(d for _, d in walked) / sum(s for s, _ in walked)
    )


@pytest.mark.parametrize("gamma", [1, 3])
def test_whole_steps_are_those_of_an_engine_that_drafts_past_the_end(gamma: int):
    length = 6
    chances = np.random.default_rng().random(length + gamma)
    steps, reached = 0.0, np.zeros(gamma)
    for outcomes in itertools.product([False, True], repeat=length + gamma):
        weight = math.prod(c if o else 1 - c for c, o in zip(chances, outcomes, strict=True))
        done = 0
        while done < length:
            drafted = outcomes[done : done + gamma]
            accepted = drafted.index(False) if False in drafted else gamma
            steps += weight
            reached[:accepted] += weight
            done += accepted + 1
    found, by_position = whole_steps([chances, np.ones(gamma)], gamma)
    assert found.tolist() == pytest.approx([steps, 0])  # the second text is too short for one
    assert by_position[0] == pytest.approx(reached)
    later, _ = whole_steps([np.concatenate([[0.0], chances])], gamma, from_prefill=True)
    assert later == pytest.approx(steps)


def test_equal_chances_approach_the_formula():
    found = replay([np.full(20000, 0.8)], 5)
    assert found.per_step.value == pytest.approx(independent(0.8, 5), rel=1e-3)
    assert independent(1.0, 5) == 6


def test_prefill_writes_the_first_token_itself():
    text = [np.array([0.0, 1.0, 1.0, 1.0])]
    assert replay(text, 2, from_prefill=True).steps[0] == 1
    assert replay(text, 2).steps[0] == 2


def test_intervals_hold_what_they_promise():
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        below = rng.integers(20, 40, 12).astype(float)
        above = below * 2.0 + rng.normal(0, 8, 12)
        found = ratio(above, below)
        inside += (found.low or 9) <= 2.0 <= (found.high or 0)
    assert 0.915 < inside / 400 < 0.98


def test_one_text_has_no_interval():
    found = ratio(np.array([4.0]), np.array([2.0]))
    assert (found.value, found.low, found.half) == (2.0, None, None)


def test_lookup_proposes_what_transformers_proposes():
    rng = np.random.default_rng()
    theirs = PromptLookupCandidateGenerator(num_output_tokens=6, max_length=10**6, vocab_size=8)
    for _ in range(30):
        text = rng.integers(0, 6, int(rng.integers(2, 40))).tolist()
        found, _ = theirs.get_candidates(torch.tensor([text]))
        assert candidates(text, 6) == found[0, len(text) :].tolist()


def test_lookup_replay_walks_the_text():
    rng = np.random.default_rng()
    prompt, written = rng.integers(0, 4, 20).tolist(), rng.integers(0, 4, 60).tolist()
    steps = drafted = done = 0
    while done < len(written):
        proposed = candidates(prompt + written[:done], 5)[: min(5, len(written) - done - 1)]
        matched = next((i for i, t in enumerate(proposed) if t != written[done + i]), len(proposed))
        steps, drafted, done = steps + 1, drafted + len(proposed), done + matched + 1
    found = replay_lookup(Rollout(0.0, (Prompt("x", tuple(prompt)),), (tuple(written),)), 5)
    assert (found.steps[0], found.drafted[0]) == (steps, drafted)
