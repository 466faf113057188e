"""A look at a conversion: its figures beside stock transformers', and the words for them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import CPU, ModelMaker
from transformers import AutoModelForCausalLM

from quantize.errors import ModelError
from quantize.evaluation.held_out import SIZES, HeldOut, look, sentence, size_of


def looked(folder: Path, parent: Path, tokens: torch.Tensor) -> HeldOut:
    return look(folder, parent, tokens, "text", "hash", vocab=300, device=CPU, dtype=torch.float32)


def test_figures_are_those_of_transformers_in_float64(converted: ModelMaker, tiny: ModelMaker):
    parent, folder = tiny("llama"), converted("rtn", "llama")
    seed = int(torch.seed() % 2**31)
    tokens = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(seed))
    found = looked(folder, parent, tokens)
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(one, dtype=torch.float64)(tokens).logits[:, :-1]
            for one in (folder, parent)
        ]
    ours, theirs = (one.double().log_softmax(-1) for one in logits)
    kld = (theirs.exp() * (theirs - ours)).sum(-1)
    assert found.tokens == 3 * 39
    assert found.kld_mean == pytest.approx(float(kld.mean()), rel=2e-3), seed
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert found.top1_agreement == pytest.approx(float(same), abs=0.02), seed
    wanted = tokens[:, 1:, None]
    for value, of in ((found.perplexity, ours), (found.parent_perplexity, theirs)):
        assert math.log(value) == pytest.approx(-float(of.gather(-1, wanted).mean()), rel=1e-3)


def test_a_parent_is_no_way_from_itself(tiny: ModelMaker):
    found = looked(tiny("llama"), tiny("llama"), torch.arange(80).view(2, 40))
    assert (found.kld_mean, found.top1_agreement) == (0, 1)
    assert size_of(0) == SIZES[0][1]


def test_logits_that_are_not_finite_are_told(tiny: ModelMaker, damaged: Path):
    with pytest.raises(ModelError, match="the output's logits are not finite on text"):
        looked(damaged, tiny("llama"), torch.arange(40).view(1, 40))


@pytest.fixture
def damaged(tiny: ModelMaker, tmp_path: Path) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny("llama") / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny("llama") / "config.json").read_bytes())
    return tmp_path


def test_words_are_in_order_and_complete():
    limits = [limit for limit, _ in SIZES]
    assert limits == sorted(limits)
    assert limits[-1] == math.inf
    assert len({words for _, words in SIZES}) == len(SIZES)
    for below, (limit, _) in itertools.pairwise(SIZES):
        assert size_of(below[0]) != size_of(math.nextafter(below[0], 0)) == below[1]
        assert limit > below[0]
    assert size_of(math.inf) == SIZES[-1][1]
    assert "hard to tell from the parent" in size_of(0.0099)


def test_the_documented_words_are_these():
    page = (Path(__file__).parents[2] / "docs/after-converting.md").read_text(encoding="utf-8")
    for limit, words in SIZES[:-1]:
        assert f"| {limit:g} | {words.partition(':')[0]} |" in page


def test_a_sentence():
    told = {
        "kld_mean": 0.0412,
        "kld_stderr": 0.0021,
        "size": "x",
        "top1_agreement": 0.9,
        "tokens": 99,
    }
    assert sentence(told) == (
        "KL divergence from the parent 0.0412 ± 0.002 (x); same first choice for 90.0 % of 99 tokens"
    )
    assert sentence(told | {"kld_stderr": None}).startswith(
        "KL divergence from the parent 0.0412 (x)"
    )
    assert sentence({"not_measured": "why"}) == "quality was not measured: why"
