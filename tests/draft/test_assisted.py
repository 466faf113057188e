"""Replay against transformers' assisted generation, which really drafts and checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drafts import REFERENCE, docstrings, rounded
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantize
from quantize.draft.policies import play, stories
from quantize.draft.replay import replay
from quantize.draft.run import Measurement, Settings, measure
from quantize.errors import UsageError
from quantize.model.load import load_model
from quantize.serving.speculation.names import NAMED, policy_named
from quantize.serving.speculation.policy import Round, Static
from quantize.serving.transformers_assistant import generated

CPU = torch.device("cpu")
TOKENS = 40


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rounded(tmp_path_factory.mktemp("draft") / "w3", 3)


@pytest.fixture(scope="module")
def measured(draft: Path) -> Measurement:
    text = str(docstrings(draft.parent / "docstrings.txt"))
    settings = Settings((text,), 4, 24, TOKENS, temperatures=(0.0, 1.0))
    return measure(REFERENCE, [draft], settings)


def test_replay_counts_what_assisted_generation_calls(measured: Measurement, draft: Path):
    """transformers' own path, nothing of pq's in between."""
    parent = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    assistant = load_model(draft, CPU, torch.float32)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    parent.register_forward_hook(count)
    greedy = measured.traces[0][0]
    for prompt, written in zip(greedy.rollout.prompts, greedy.rollout.tokens, strict=True):
        ids = torch.tensor([prompt.ids])
        out = parent.generate(
            ids, assistant_model=assistant, max_new_tokens=TOKENS, do_sample=False
        )
        assert tuple(out[0, len(prompt.ids) :].tolist()) == written
    found = replay(greedy["accept"], 4)
    assert found.per_step.value == pytest.approx(greedy.rollout.count / calls, abs=5e-4)
    assert 1.5 < found.per_step.value < 4.9  # neither end, where anything would agree
    assert measured.drafts[0].at(0.0).length(4).tokens_per_step.value == found.per_step.value


@pytest.mark.parametrize("policy", [*NAMED, Static(5)], ids=lambda p: p.name)
def test_no_policy_changes_greedy_text(measured: Measurement, draft: Path, policy: Any):
    parent, assistant = (load_model(f, CPU, torch.float32) for f in (REFERENCE, draft))
    greedy = measured.traces[0][0]
    prompt, written = greedy.rollout.prompts[1], greedy.rollout.tokens[1]
    out, steps = generated(parent, prompt.ids, TOKENS, assistant, policy, 0.0)
    assert tuple(out) == written
    assert sum(step.accepted + 1 for step in steps) == len(written)
    greedy_of_one = greedy.only([1])
    played = play(policy, stories(greedy_of_one))
    assert played.steps[0] == len(steps)  # replay takes the very same steps
    at = 0
    for step in steps:  # what policies are told is what the streamed pass finds
        kl = greedy["kl"][1][at : at + step.accepted + 1]
        assert step.kl[: len(kl)] == pytest.approx(kl[: step.drafted], abs=1e-4)
        seen = [s.entropy for s in step.signals[: step.accepted]]
        assert seen == pytest.approx(
            greedy["entropy"][1][at : at + step.accepted].tolist(), abs=1e-4
        )
        at += step.accepted + 1


def small(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.6)
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    parent, draft = small(1), small(1)
    with torch.no_grad():
        draft.lm_head.weight += 0.45 * torch.randn_like(draft.lm_head.weight)
    return parent, draft


def surprise(model: Any, text: list[int], first: int, temperature: float) -> float:
    """Pearson's χ² of how often the token of each rank was written, given what the model expects,
    over its 11 degrees of freedom; its mean is below 1 where the text is the model's."""
    with torch.no_grad():
        p = (model(torch.tensor([text])).logits[0, first - 1 : -1].double() / temperature).softmax(
            -1
        )
    order = p.argsort(-1, descending=True)
    ranked = p.gather(-1, order)
    rank = (order == torch.tensor(text[first:])[:, None]).double()
    expected, seen = ranked.sum(0), rank.sum(0)
    return float(((seen - expected) ** 2 / expected).sum() / 11)


@pytest.mark.parametrize(
    "policy", [pytest.param("dsde-published-code", marks=pytest.mark.slow), "adaedl"]
)
def test_sampled_text_is_distributed_as_the_parents(pair: Any, policy: str):
    parent, draft = pair
    torch.manual_seed(11)
    prompt, temperature = [1, 2, 3], 0.8
    out, steps = generated(parent, prompt, 200, draft, policy_named(policy), temperature)
    accepted = sum(step.accepted for step in steps)
    rejected = sum(step.accepted < step.drafted for step in steps)
    assert min(accepted, rejected) > 40  # both ways of getting a token are taken often
    text = prompt + out
    assert surprise(parent, text, 3, temperature) < 2.5
    assert surprise(draft, text, 3, temperature) > 2.5  # the test can tell


def test_sampled_steps_are_as_many_as_replay_expects(measured: Measurement, draft: Path):
    """Fresh samples from real speculative sampling against the interval of one rollout's replay."""
    parent, assistant = (load_model(f, CPU, torch.float32) for f in (REFERENCE, draft))
    sampled = measured.traces[0][1]
    torch.manual_seed(5)
    tokens = steps = 0
    for prompt in sampled.rollout.prompts:
        out, done = generated(parent, prompt.ids, TOKENS, assistant, Static(3), 1.0)
        tokens, steps = tokens + len(out), steps + len(done)
    expected = replay(sampled["accept"], 3)
    # both samples scatter: a step gives 1 … 4 tokens, σ < 1.3
    error = 4 * 1.3 * np.sqrt(1 / steps + 1 / expected.steps.sum())
    assert abs(tokens / steps - expected.per_step.value) < error


def test_import_quantize_is_enough(pair: Any):
    parent, draft = pair
    ids = torch.tensor([[1, 2, 3]])
    plain = parent.generate(ids, max_new_tokens=20, do_sample=False)
    how = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(
        parent.generate(ids, custom_generate=quantize.assisted(draft, "dsde-paper"), **how), plain
    )
    with pytest.raises(UsageError, match="policy 'dsd': choose static-N, fitted:FILE, dsde-paper"):
        quantize.assisted(draft, "dsd")
    assert Round(0, 0).kl == ()
