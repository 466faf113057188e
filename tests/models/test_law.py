"""The twelve most common types obey the law; `make test-models` puts all of them to all of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import law, zoo
from models.subject import Item, Row, Subject
from quantize.errors import ModelError, VerifyError

TWELVE = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "olmo2",
    "granite",
    "cohere2",
]
OTHERS = [
    "qwen2_moe",
    "qwen3_next",
    "qwen3_5_text",
    "ministral3",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "glm4",
    "glm4_moe",
    "smollm3",
    "olmo3",
    "granitemoehybrid",
    "llama4_text",
    "nemotron",
    "nemotron_h",
    "falcon",
    "falcon_h1",
    "exaone4",
    "ctrl",
    "apertus",
    "ernie4_5_moe",
    "glm_moe_dsa",
    "gpt_bigcode",
]


def subject(model_type: str, work: Path) -> Subject:
    made = Subject(Item(model_type, False), work)
    zoo.liven(made.model, seed=len(model_type))
    return made


def held(row: Row) -> Row:
    assert row["status"] == "holds", row
    return row


@pytest.mark.parametrize("model_type", TWELVE)
def test_the_walk_and_eight_bits(model_type: str, tmp_path: Path) -> None:
    one = subject(model_type, tmp_path)
    held(law.stream(one))
    found = held(law.rtn8(one))
    assert found["kld"] > 0
    assert "stock_kld" in found
    assert not found["keys"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TWELVE)
def test_all_of_the_law(model_type: str, tmp_path: Path) -> None:
    one = subject(model_type, tmp_path)
    for check in law.CHECKS[3:]:
        row = check(one)
        assert row["ok"], (check.__name__, row)
        assert row["status"] == "holds" or check is law.rotate, row


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS)
def test_types_that_showed_what_was_wrong(model_type: str, tmp_path: Path) -> None:
    one = subject(model_type, tmp_path)
    for check in (law.stream, law.rtn8, law.smooth):
        held(check(one))


@pytest.mark.parametrize("model_type", ["zamba", "zaya"])
def test_a_refusal_is_one_line_that_names_the_model(model_type: str, tmp_path: Path) -> None:
    row = law.stream(subject(model_type, tmp_path))
    assert row["status"] == "refused"
    assert row["ok"]
    assert "ForCausalLM: " in row["why"]


# That the law can be broken


def test_a_wrong_walk_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject("llama", tmp_path)
    right = law.streamed_logits
    monkeypatch.setattr(law, "streamed_logits", lambda *args: right(*args) * 1.001)
    assert law.stream(one)["status"] == "wrong"


def test_an_output_that_stock_does_not_load_whole_is_wrong_unless_pq_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject("ctrl", tmp_path)
    output, summary = law.converted(one, "rtn8", ["{method: rtn, bits: 8, group_size: GROUP}"])
    assert "ok" not in law.loads(one, output, summary)
    mine = law.streamed_logits(output, one.ids)
    for path in output.glob("*.safetensors"):
        rewritten(path, leave_out="lm_head.bias")
    with pytest.raises(ModelError, match=r"lm_head\.bias is missing"):
        law.loads(one, output, summary)
    monkeypatch.setattr(law, "streamed_logits", lambda *args: mine)
    wrong = law.loads(one, output, summary)
    assert wrong["ok"] is False
    assert wrong["keys"] == {"missing_keys": ["lm_head.bias"]}
    told = SimpleNamespace(lost=["stock transformers does not load this: it cannot"])
    assert law.loads(one, output, told)["stock"] == "cannot load it, as pq says"  # type: ignore[arg-type]


def rewritten(path: Path, leave_out: str) -> None:
    tensors = load_file(path)
    if tensors.pop(leave_out, None) is not None:
        save_file(tensors, path, metadata={"format": "pt"})
        index = path.parent / "model.safetensors.index.json"
        if index.exists():
            listed = json.loads(index.read_text())
            listed["weight_map"].pop(leave_out)
            index.write_text(json.dumps(listed))


def test_several_lines_and_faults_of_pq_are_no_refusal(tmp_path: Path) -> None:
    @law.law
    def verbose(subject: Subject) -> Row:
        raise ModelError("two\nlines")

    @law.law
    def broken(subject: Subject) -> Row:
        raise VerifyError("a fault")

    one = subject("gpt2", tmp_path)
    assert not verbose(one)["ok"]
    with pytest.raises(VerifyError):
        broken(one)


def test_divergence_is_that_of_softmax() -> None:
    generator = torch.Generator().manual_seed(5)
    p, q = torch.randn(2, 3, 4, 7, generator=generator).double()
    by_hand = (p.softmax(-1) * (p.softmax(-1).log() - q.softmax(-1).log())).sum(-1)
    torch.testing.assert_close(law.divergences(p.float(), q.float()), by_hand, atol=1e-6, rtol=1e-5)
    assert float(law.divergences(p, p).abs().max()) < 1e-12
