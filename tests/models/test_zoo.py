"""The models of the zoo are small, real and not degenerate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import zoo
from models.shrink import shrunken

TWELVE = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "deepseek_v3",
    "gpt2",
]


@pytest.mark.parametrize("model_type", TWELVE)
def test_a_model_is_not_degenerate(model_type: str) -> None:
    model = zoo.build(model_type, seed=3)
    ids = zoo.tokens(seed=4)
    blocks = zoo.find_blocks(model, lambda: zoo.logits(model, ids))
    changes, scores = zoo.measure(model, blocks, ids)
    assert len(blocks.modules) == model.config.num_hidden_layers
    assert zoo.ENTROPY[0] < zoo.entropy(scores) < zoo.ENTROPY[1]
    assert all(zoo.CHANGE[0] < change < zoo.CHANGE[1] for change in changes), changes
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if parameter.numel() > 1 and not name.endswith("sinks"):
            assert float(parameter.detach().std()) > 1e-3, name


def test_entropy_of_even_and_of_certain_logits() -> None:
    even = torch.zeros(3, 512)
    assert zoo.entropy(even) == pytest.approx(math.log(512), abs=1e-5)
    assert zoo.entropy(even + 1e3 * torch.eye(3, 512)) == pytest.approx(0, abs=1e-5)


def test_a_seed_makes_one_model() -> None:
    first, again, other = (zoo.build("qwen2_moe", seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "proj" in name)


def test_a_saved_model_loads_with_its_tokenizer_and_text(tmp_path: Path) -> None:
    model = zoo.build("mixtral", seed=1)
    folder = zoo.save(model, tmp_path / "mixtral")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = zoo.tokens(seed=2)
    torch.testing.assert_close(zoo.logits(loaded, ids), zoo.logits(model, ids))
    assert len((folder / "text.txt").read_text().split()) > 300


def test_every_kind_of_layer_stays_and_only_sizes_shrink() -> None:
    gemma = shrunken("gemma3_text")
    assert gemma.layer_types == ["sliding_attention", "full_attention"]
    assert gemma.tie_word_embeddings
    assert (gemma.num_attention_heads, gemma.num_key_value_heads) == (4, 2)  # 8 and 4
    assert (gemma.hidden_size, gemma.head_dim, gemma.vocab_size) == (128, 32, 512)
    deepseek = shrunken("deepseek_v3")
    assert deepseek.num_hidden_layers == 2
    assert deepseek.first_k_dense_replace == 1
    assert deepseek.n_routed_experts == 4
    assert shrunken("smollm3").no_rope_layers == [1, 0]
    assert shrunken("granite", logits_scaling=7.0).logits_scaling == 7.0
    whole = shrunken("paligemma")
    # Its class gives its decoder one head for keys, whose own class has as many as for queries.
    assert whole.text_config.num_key_value_heads == 1
    assert whole.vision_config.hidden_size == 128


def test_special_tokens_lie_in_the_vocabulary_and_apart_from_text() -> None:
    config = shrunken("gemma3")
    special = {config.image_token_index, config.boi_token_index, config.eoi_token_index}
    assert len(special) == 3
    assert all(zoo.tokens().max() < token < 512 for token in special)
