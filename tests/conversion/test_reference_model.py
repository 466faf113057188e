"""The embedded reference model: loads as any checkpoint, has learnt its text, and carries real outliers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantize.calibration import pydocs
from quantize.files.resources import data_dir

FOLDER = data_dir("eval") / "reference-model"
WINDOW = 512


def load_script(name: str) -> Any:
    """Return eval/reference-model/NAME.py, which is a script beside data and in no package."""
    spec = importlib.util.spec_from_file_location(f"reference_model_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


add_outliers: Callable[..., dict[str, Tensor]] = load_script("outliers").add_outliers


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return dict(load_file(FOLDER / "model.safetensors"))


def tiny_llama(kv_heads: int, tied: bool, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


@settings(max_examples=10, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 5),
)
def test_outliers_keep_the_function(kv_heads: int, tied: bool, seed: int, channels: int) -> None:
    model = tiny_llama(kv_heads, tied, seed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = add_outliers(before, model.config, seed, channels, (4, 6))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        tokens = torch.randint(64, (2, 24))
        expected = model(tokens).logits
        model.load_state_dict(after)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_outliers_touch_every_place_by_powers_of_two() -> None:
    model = tiny_llama(2, True, 0).bfloat16()
    before = model.state_dict()
    after = add_outliers(before, model.config, 0, 3, (4, 6))
    untouched = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for name, tensor in before.items():
        factors = (after[name].float() / tensor.float()).nan_to_num(1.0)
        assert bool((factors.log2() == factors.log2().round()).all())
        assert (int((factors != 1).sum()) == 0) == (name in untouched), name
    norms = [n for n in before if n.endswith("layernorm.weight")]
    hot = [set((after[n] != before[n]).nonzero().flatten().tolist()) for n in norms]
    assert all(len(channels) == 3 and channels == hot[0] for channels in hot)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        rows = ((after[name].abs().sum(1) / before[name].abs().sum(1)) > 4).view(
            2, 2, 8
        )  # [head, half, pair]
        assert int(rows.sum()) == 2 * 2 * 3
        assert torch.equal(rows[:, 0], rows[:, 1])


def test_the_checkpoint_is_small_tied_and_of_packable_widths(weights: dict[str, Tensor]) -> None:
    config = LlamaConfig.from_pretrained(FOLDER)
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) <= 4_000_000
    assert config.num_key_value_heads < config.num_attention_heads
    for width in (
        config.hidden_size,
        config.intermediate_size,
        config.num_key_value_heads * config.head_dim,
    ):
        assert width % 128 == 0
    assert (config.head_dim, config.max_position_embeddings, str(config.dtype)) == (
        64,
        1024,
        "torch.bfloat16",
    )
    assert config.tie_word_embeddings
    assert "lm_head.weight" not in weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (FOLDER / "generation_config.json").is_file()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=200))
def test_the_tokenizer_gives_text_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_adds_no_special_tokens(tokenizer: Any) -> None:
    ids = tokenizer.encode("def main() -> None:\n    return 'naïve ☃'\n")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
    assert len(tokenizer) % 128 == 0


def test_heldout_text_costs_few_bits(model: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode(pydocs.text("heldout")[:24_000])
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    assert len(windows) >= 14
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].float()
    nats = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
    # Byte-level tokens write each byte as one character, so that this holds where a window cuts a character.
    size = sum(
        len(token)
        for row in windows[:, 1:].tolist()
        for token in tokenizer.convert_ids_to_tokens(row)
    )
    assert 1.0 < nats / math.log(2) / size <= 2.3


def test_the_outliers_are_there(weights: dict[str, Tensor]) -> None:
    hot = []
    for name, tensor in weights.items():
        peak = tensor.float().abs() / tensor.float().abs().median()
        if name.endswith("layernorm.weight"):
            assert float(peak.max()) >= 8, name
            hot.append((peak >= 8).nonzero().flatten().tolist())
        if name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            rows = tensor.float().norm(dim=1)
            assert float(rows.max() / rows.median()) >= 8, name
    assert len(hot) >= 4
    assert all(channels == hot[0] for channels in hot)


def test_build_measures_bytes_like_the_text(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))  # build.py imports its neighbour as a script does
    build = load_script("build")
    text = pydocs.text("heldout")[:20_000] + "naïve ☃"
    assert int(build.bytes_per_token(tokenizer)[tokenizer.encode(text)].sum()) == len(text.encode())
