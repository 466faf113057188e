"""Windows that a model has no positions for are refused before they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_side_files
from transformers import AutoConfig, AutoModelForCausalLM

from quantize.calibration.fit import context_of
from quantize.errors import UsageError
from quantize.model.positions import most_positions, require_positions

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]
SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"n_positions": 48, "n_embd": 32, "n_layer": 1, "n_head": 2}),
    (
        "opt",
        SIZES
        | {
            "max_position_embeddings": 48,
            "num_attention_heads": 2,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    (
        "gpt_neo",
        SIZES
        | {
            "max_position_embeddings": 48,
            "num_layers": 1,
            "num_heads": 2,
            "attention_types": [[["global"], 1]],
        },
    ),
    ("mpt", {"max_seq_len": 48, "d_model": 32, "n_heads": 2, "n_layers": 1}),
    ("gptj", {"n_positions": 48, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}),
    (
        "llama",
        SIZES | {"max_position_embeddings": 48, "num_attention_heads": 2, "intermediate_size": 64},
    ),
    ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}),
]


@pytest.mark.parametrize(("family", "sizes"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_the_bound_is_where_transformers_fails(family: str, sizes: dict[str, Any]):
    config = AutoConfig.for_model(family, **({"vocab_size": 300} | sizes))
    model = AutoModelForCausalLM.from_config(config).eval()

    def reads(length: int) -> bool:
        try:
            with torch.no_grad():
                model(torch.zeros(1, length, dtype=torch.int64), use_cache=False)
        except (IndexError, RuntimeError):
            return False
        return True

    assert reads(48)
    hard = not reads(49)
    assert most_positions(model) == (48 if hard else None)
    require_positions(model, 48)
    if hard:
        with pytest.raises(UsageError, match="has 48 positions and no more; lower seqlen to 48"):
            require_positions(model, 49)
    else:
        require_positions(model, 4096)
    if family != "bloom":
        assert context_of(config.to_dict()) == 48


def test_commands_say_so_in_one_line(pq: Call, text_file: Path, tmp_path: Path):
    folder = tmp_path / "opt"
    config = AutoConfig.for_model("opt", **dict(FAMILIES)["opt"])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_side_files(folder)
    text = ("--dataset", text_file, "--seqlen")
    convert = ("convert", "-m", folder, "-r", "gptq", "-o", tmp_path / "out", "--nsamples", 1)
    for arguments in (("eval", folder, "--max-windows", 1), convert):
        code, _, err = pq(*arguments, *text, 49)
        assert code == 2, err
        assert "windows of 49 tokens: OPTForCausalLM has 48 positions" in err
        assert err.count("pq: error") == 1
    code, _, err = pq("eval", folder, "--max-windows", 1, *text, 48)
    assert code == 0, err
