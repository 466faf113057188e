"""Rollout and trace against stock transformers in float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from drafts import REFERENCE, docstrings, rounded
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize.draft.prompts import Prompt, prompts_of
from quantize.draft.rollout import Rollout, read_rollouts, roll_out, save_rollouts
from quantize.draft.run import Settings, measure
from quantize.draft.tokenizers import compare_ids
from quantize.draft.trace import _compare, trace
from quantize.errors import DataError, ModelError, UsageError
from quantize.evaluation.streamed import open_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rounded(tmp_path_factory.mktemp("trace") / "w3", 3)


def plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def test_columns_are_those_of_both_distributions(draft: Path):
    rng = np.random.default_rng()
    prompts = tuple(Prompt("x", tuple(rng.integers(2, 1500, n))) for n in (5, 9, 30))
    tokens = tuple(tuple(int(t) for t in rng.integers(2, 1500, n)) for n in (12, 3, 7))
    temperature = 0.7
    rollout = Rollout(temperature, prompts, tokens)
    models = [open_model(folder, CPU, torch.float32, "stock") for folder in (REFERENCE, draft)]
    found = trace(models[0], models[1:], [rollout], 1536)[0][0]
    parent = plain(REFERENCE)
    from quantize.model.load import load_model

    ours = load_model(draft, CPU, torch.float32, "stock").double()
    for text, (prompt, written) in enumerate(zip(prompts, tokens, strict=True)):
        ids = torch.tensor([[*map(int, prompt.ids), *written]])
        at = slice(len(prompt.ids) - 1, -1)
        p = (parent(ids).logits[0, at] / temperature).softmax(-1)
        q = (ours(ids).logits[0, at] / temperature).softmax(-1)
        x = torch.tensor(written)[:, None]
        wanted = {
            "kl": (p * (p / q).log()).sum(-1),
            "overlap": torch.minimum(p, q).sum(-1),
            "accept": (q.gather(1, x) / p.gather(1, x)).clamp_max(1)[:, 0],
            "entropy": -(q * q.log()).sum(-1),
            "confidence": q.max(-1).values,
            "nll": -p.gather(1, x)[:, 0].log(),
        }
        for name, values in wanted.items():
            assert found[name][text] == pytest.approx(values.numpy(), rel=2e-3, abs=2e-4), name
        assert found.choice[text].tolist() == q.argmax(-1).tolist()


def test_the_parent_writes_what_transformers_writes():
    parent = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    prompts = [Prompt("x", (5, 6, 7)), Prompt("x", (9, 10, 11, 12)), Prompt("x", (7, 6, 5))]
    found = roll_out(parent, prompts, 10, 0.0, seed=0, stop=(), vocab=1536, device=CPU)
    for prompt, written in zip(prompts, found.tokens, strict=True):
        ids = torch.tensor([prompt.ids])
        out = parent.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert tuple(out[0, len(prompt.ids) :].tolist()) == written
    stop = found.tokens[0][4]
    ended = roll_out(parent, prompts, 10, 0.0, seed=0, stop=(stop,), vocab=1536, device=CPU)
    first = found.tokens[0].index(stop)
    assert ended.tokens[0] == found.tokens[0][: first + 1]


@torch.no_grad()
def test_the_parent_draws_from_its_distribution():
    parent = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    prompts = [Prompt("x", (40, 41, 42))] * 640
    found = roll_out(parent, prompts, 1, 1.0, seed=3, stop=(), vocab=1536, device=CPU)
    p = (parent(torch.tensor([[40, 41, 42]])).logits[0, -1]).softmax(-1).double()
    counts = torch.bincount(torch.tensor(found.tokens)[:, 0], minlength=1536).double()
    likely = p * 640 >= 5
    expected = torch.cat([p[likely], p[~likely].sum()[None]]) * 640
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
    freedom = len(expected) - 1
    chi2 = float(((seen - expected) ** 2 / expected).sum())
    assert freedom >= 3
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_a_model_drafts_perfectly_for_itself_and_rollouts_can_be_kept(tmp_path: Path):
    text = str(docstrings(tmp_path / "text.txt"))
    settings = Settings((text,), 3, 8, 12, temperatures=(0.0, 1.0))
    found = measure(REFERENCE, [REFERENCE], settings)
    for t in (0.0, 1.0):
        s = found.drafts[0].at(t)
        assert s.alpha is not None and s.kl is not None  # noqa: PT018
        assert s.alpha.value == pytest.approx(1, abs=1e-5)
        assert s.kl.value == pytest.approx(0, abs=1e-6)
        assert s.length(4).tokens_per_step.value == pytest.approx(12 / 3, abs=1e-3)
    assert found.drafts[1].name == "n-gram lookup"
    file = tmp_path / "rollout.json"
    save_rollouts(found.rollouts, found.parent, file)
    kept = read_rollouts(file)
    assert kept == list(found.rollouts)
    facts = json.loads(file.read_text())
    facts["rollouts"][0]["texts"][0]["tokens"] = [7] * 12  # no model's likeliest
    file.write_text(json.dumps(facts))
    models = [open_model(REFERENCE, CPU, torch.float32, "stock") for _ in range(2)]
    with pytest.raises(DataError, match="of the greedy rollout are not what this parent"):
        trace(models[0], models[1:], read_rollouts(file), 1536)
    file.write_text("{}")
    with pytest.raises(DataError, match="is no rollout"):
        read_rollouts(file)


def test_what_the_parent_rounds_otherwise_is_not_held_against_the_draft(tmp_path: Path):
    text = str(docstrings(tmp_path / "text.txt"))
    found = measure(REFERENCE, [REFERENCE], Settings((text,), 4, 8, 40, temperatures=(0.0,)))
    rollout = found.rollouts[0]
    assert rollout.count > 100  # one token in a hundred may be another
    *before, last = rollout.tokens[0]
    other = Rollout(0.0, rollout.prompts, ((*before, last ^ 1), *rollout.tokens[1:]))
    models = [open_model(REFERENCE, CPU, torch.float32, "stock") for _ in range(2)]
    (judged,) = trace(models[0], models[1:], [other], 1536)[0]
    assert judged["accept"][0].tolist() == [1.0] * len(rollout.tokens[0])


def test_of_equal_logits_both_models_take_the_same():
    logits = torch.zeros(200, 500)  # of equals topk may put any first
    logits[:, 100:] = torch.randint(0, 2, (200, 400)).float()
    found = _compare(logits, logits.clone(), logits.argmax(-1), 0.0)
    assert found["accept"].tolist() == found["top1"].tolist() == [1.0] * 200
    assert found["margin"].abs().max() < 1e-6


def test_tokenizers_are_compared_by_ids(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<new>"])
    found = compare_ids(tokenizer, more, tmp_path)
    assert (found.only_parent, found.only_draft) == (0, 1)
    assert "the draft's" in found.note
    assert compare_ids(tokenizer, tokenizer, tmp_path).note == ""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    a, b = (name for name, index in vocabulary.items() if index in (700, 900))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(ModelError, match=r"2 of 1536 ids differ, the first 700"):
        compare_ids(tokenizer, swapped, tmp_path)


def test_prompts_of_chats_end_where_the_answer_begins(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    file = tmp_path / "chats.jsonl"
    turns = [
        {"role": "user", "content": "list the keys"},
        {"role": "assistant", "content": "use keys()"},
    ]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    found = prompts_of(tokenizer, [str(file)], 4, 8)
    assert tokenizer.decode(found.prompts[0].ids) == "[user] list the keys\n[assistant] "
    assert found.prompts[0].domain == "chats.jsonl"
    text = docstrings(tmp_path / "text.txt")
    both = prompts_of(tokenizer, [str(file), str(text)], 4, 8)
    assert [p.domain for p in both.prompts] == ["chats.jsonl"] + ["text.txt"] * 4
    assert {len(p.ids) for p in both.prompts[1:]} == {8}


def test_settings_refuse_what_means_nothing():
    with pytest.raises(UsageError, match="temperatures"):
        Settings(temperatures=(-1.0,))
    with pytest.raises(UsageError, match="lengths"):
        Settings(gammas=(0,))
