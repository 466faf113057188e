"""The real engine on the INT4 KV cache: what it computes, how large its pages are, and that nothing which vLLM
does with requests changes a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ATTENTION, ROLES, write
from engine import ask
from test_linears import prompts

from quantize.formats.kv4 import KvScheme
from quantize.formats.packed_int import IntScheme

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these")

SCHEMES = {
    f"model.layers.1.{ROLES[role]}": IntScheme(4, 64, False) for role in ("q", "k", "v", "o")
}


@pytest.mark.parametrize("changes", [{}, {"affine": True}])
def test_logprobs_are_those_of_transformers(changes: dict[str, bool], tmp_path: Path):
    model = write(tmp_path / "model", SCHEMES, attention=ATTENTION | changes)
    request = {"model": model, "dtype": "float32", "runs": [{"prompts": prompts(90, 40, 5)}]}
    (wanted,) = ask(tmp_path, by="transformers", **request)
    (found, [facts]) = ask(tmp_path, facts=True, **request)
    differences = [
        (torch.tensor(have["logprobs"]) - torch.tensor(want["logprobs"])).abs()
        for have, want in zip(found, wanted, strict=True)
    ]
    # A last bit can move a code of the cache, or of a query, to its neighbour, and later tokens see it: more often
    # where states are rotated, by products whose order of summing differs.
    assert torch.cat(differences).mean() < (0.05 if changes else 2e-3)
    assert torch.cat(differences).median() < 1e-5
    # Two records of 32 bytes of codes and one scale, for each of two heads of each token.
    assert KvScheme().record_bytes(64) == 34
    assert set(facts["bytes_of_token"]) == {2 * 2 * 34}


def longest_first(lengths: list[int]) -> list[list[int]]:
    shared = prompts(70)[0]
    return [shared + rest for rest in prompts(*lengths)]


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_requests_do_not_change_each_other(way: str, tmp_path: Path):
    """Chunks of 32 tokens, pages for three sequences or so, and prompts that begin alike: prompts are cut, pages
    are shared, and requests are thrown out and begun anew."""
    model = write(tmp_path / "model", SCHEMES, attention=ATTENTION)
    batch = {"prompts": longest_first([60, 1, 33, 90, 12, 45]), "max_tokens": 24, "logprobs": False}
    alone: dict[str, Any] = {"enforce_eager": way == "eager"}
    crowded = alone | {
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 6,
        "num_gpu_blocks_override": 14,
        "block_size": 32,
        "max_model_len": 256,
    }
    one = ask(tmp_path, model=model, dtype="float32", engine=alone | {"enable_prefix_caching": False},
              runs=[batch | {"together": False}])  # fmt: skip
    many = ask(
        tmp_path, model=model, dtype="float32", engine=crowded, runs=[batch, batch], facts=True
    )
    assert many[2][0]["preemptions"] > 0
    assert sum(answer["cached"] for answer in many[1]) > 0
    wanted = [answer["tokens"] for answer in one[0]]
    assert [answer["tokens"] for answer in many[0]] == wanted
    assert [answer["tokens"] for answer in many[1]] == wanted
