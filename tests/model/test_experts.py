"""Split experts compute what transformers' stacked ones do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantize.errors import ModelError
from quantize.model.experts import Experts, split_experts

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
TYPES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "llama4_text": {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 16},
}


def tiny(kind: str) -> Any:
    config = AutoConfig.for_model(kind, **SMALL | TYPES[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("kind", TYPES)
def test_logits_stay(kind: str) -> None:
    model = tiny(kind)
    split = copy.deepcopy(model)
    names = split_experts(split)
    assert names
    assert not any(p.ndim == 3 for name in names for p in split.get_submodule(name).parameters())
    tokens = torch.randint(64, (2, 9))
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
        torch.testing.assert_close(
            split(tokens, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-5
        )
        for name in names:
            experts = split.get_submodule(name)
            assert isinstance(experts, Experts)
            experts.every_token = True
        torch.testing.assert_close(
            split(tokens, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-5
        )


def test_a_function_unlike_its_layout_is_refused() -> None:
    model = tiny("qwen2_moe")
    experts = model.model.layers[0].mlp.experts
    experts.is_concatenated = False
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts"):
        split_experts(model)


@pytest.mark.parametrize("kind", TYPES)
def test_every_token_runs_without_data(kind: str) -> None:
    """On the meta device, every expert is given one and the same tensor."""
    config = AutoConfig.for_model(kind, **SMALL | TYPES[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts: Any = model.get_submodule(split_experts(model)[0])
    experts.every_token = True
    seen = []
    for linears in experts.children():
        linears.up_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.empty(8, 32, device="meta", dtype=model.dtype)
    index, weights = torch.empty(2, 8, 2, device="meta")
    routing = () if kind == "llama4_text" else (index.long(), weights)
    assert experts(x, *routing).shape == x.shape
    assert len(seen) == 4
    assert all(given is x for given in seen)
