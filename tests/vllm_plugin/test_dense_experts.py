"""The real engine puts LaDiMo's experts in the places of dense FFNs, in classes of vLLM that have none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import DENSE_EXPERTS, REFERENCE, bitvec, with_experts, write
from engine import ask
from test_linears import prompts

from quantize.formats.packed_int import IntScheme
from quantize.formats.routing import Policy, Threshold, TopK
from quantize.formats.scheme import AnyScheme

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these")

W4A16 = IntScheme(4, 64, False)
ROUTING: dict[str, Policy] = {
    "model.layers.0.mlp": Threshold(0.1),
    "model.layers.1.mlp": TopK(1, renormalize=True),
}


def schemes_of(block: int) -> dict[str, AnyScheme]:
    """Routed experts of one scheme, the shared one of another, one linear left alone."""
    out: dict[str, AnyScheme] = {}
    for e in range(DENSE_EXPERTS["n"]):
        for role in ("gate", "up", "down"):
            out[f"model.layers.{block}.mlp.experts.{e}.{role}_proj"] = W4A16
    for role in ("gate", "down"):
        out[f"model.layers.{block}.mlp.shared_expert.{role}_proj"] = bitvec(4, 64)
    return out


def llama(folder: Path) -> Path:
    """The last block keeps its dense FFN."""
    return with_experts(write(folder, {}), schemes_of(1), ROUTING)


def gemma(folder: Path) -> Path:
    """Random weights, GeGLU, norms around the FFN."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = json.loads((REFERENCE / "config.json").read_text())
    sizes = {key: own[key] for key in ("hidden_size", "head_dim", "num_attention_heads", "vocab_size",
             "num_key_value_heads", "max_position_embeddings")}  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3_text",
        **sizes,
        intermediate_size=384,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=32,
        query_pre_attn_scalar=64,
        tie_word_embeddings=True,
        architectures=["Gemma3ForCausalLM"],
    )
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, folder)
    return with_experts(folder, schemes_of(1), ROUTING)


@pytest.mark.parametrize("maker", [llama, gemma])
def test_logprobs_are_those_of_transformers(maker, tmp_path: Path):
    model = maker(tmp_path / "model")
    request = {
        "model": model,
        "dtype": "float32",
        "runs": [{"prompts": prompts(60, 9), "max_tokens": 4}],
    }
    (wanted,) = ask(tmp_path, by="transformers", **request)
    (found,) = ask(tmp_path, engine={"enforce_eager": maker is gemma}, **request)
    for have, want in zip(found, wanted, strict=True):
        assert have["tokens"] == want["tokens"]
        have, want = torch.tensor(have["logprobs"]), torch.tensor(want["logprobs"])
        torch.testing.assert_close(have, want, rtol=0, atol=2e-4)


def test_a_class_that_is_not_known_says_so(tmp_path: Path):
    model = llama(tmp_path / "model")
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["OlmoForCausalLM"]}))
    with pytest.raises(AssertionError, match="this is OlmoForCausalLM; load it with transformers"):
        ask(tmp_path, model=model, dtype="float32", runs=[])
