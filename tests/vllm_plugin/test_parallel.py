"""Two processes of the real engine share every packed layout, and compute what one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import ATTENTION, EXPERTS, HEAD, ROLES, bitvec, packed, write, write_moe
from engine import ask
from test_dense_experts import llama
from test_linears import prompts

from quantize.formats.fp8 import product_weight, row_factor
from quantize.formats.packed_int import IntScheme
from quantize.formats.routing import Threshold
from quantize.formats.scheme import AnyScheme

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these")

W4A16 = IntScheme(4, 64, False)


def linears(folder: Path) -> Path:
    """Columns are cut in any layout, inputs between groups; one input is rotated whole."""
    w4a8 = IntScheme(4, 128, True)
    ways: list[dict[str, AnyScheme]] = [
        {"q": W4A16, "k": W4A16, "v": W4A16, "o": bitvec(4), "gate": bitvec(2), "up": bitvec(3), "down": W4A16},
        {"q": w4a8, "k": bitvec(8, 64), "v": w4a8, "o": IntScheme(8, None, False), "up": w4a8,
         "down": bitvec(5, 64, False)},
        {"q": bitvec(4), "v": IntScheme(3, 32, False), "o": IntScheme(3, 32, False), "gate": W4A16,
         "up": W4A16},
    ]  # fmt: skip
    schemes = {
        f"model.layers.{i}.{ROLES[role]}": scheme
        for i, way in enumerate(ways)
        for role, scheme in way.items()
    }
    rotated = [f"model.layers.{i}.{ROLES['down']}" for i in (0, 2)]
    return write(folder, schemes | {HEAD: w4a8}, rotated=rotated)


def routed(folder: Path) -> Path:
    """Packed experts of `qwen2_moe`, and 16-bit ones."""
    schemes: dict[str, AnyScheme] = {
        f"model.layers.1.mlp.experts.{e}.{role}_proj": scheme
        for e in range(EXPERTS)
        for role, scheme in (("gate", W4A16), ("up", W4A16), ("down", bitvec(4, 64)))
    }
    return write_moe(folder, schemes, {"model.layers.0.mlp": Threshold(0.25)})


@pytest.mark.parametrize("maker", [linears, routed, llama])
def test_two_processes_compute_what_transformers_does(
    maker: Callable[[Path], Path], tmp_path: Path
):
    model = maker(tmp_path / "model")
    request = {
        "model": model,
        "dtype": "float32",
        "runs": [{"prompts": prompts(60, 3), "max_tokens": 4}],
    }
    (wanted,) = ask(tmp_path, by="transformers", **request)
    (found,) = ask(tmp_path, engine={"tensor_parallel_size": 2}, **request)
    for have, want in zip(found, wanted, strict=True):
        assert have["tokens"] == want["tokens"]
        have, want = torch.tensor(have["logprobs"]), torch.tensor(want["logprobs"])
        torch.testing.assert_close(have, want, rtol=0, atol=2e-3)
        assert (have - want).abs().mean() < 1e-4


def test_each_process_has_the_scales_of_its_heads(tmp_path: Path):
    model = write(tmp_path / "model", {}, attention=ATTENTION)
    request = {"model": model, "dtype": "float32", "runs": [{"prompts": prompts(90, 5)}]}
    (wanted,) = ask(tmp_path, by="transformers", **request)
    (found,) = ask(tmp_path, engine={"tensor_parallel_size": 2}, **request)
    differences = [
        (torch.tensor(have["logprobs"]) - torch.tensor(want["logprobs"])).abs()
        for have, want in zip(found, wanted, strict=True)
    ]
    # A last bit can move a code of the cache, or of a query, to its neighbour.
    assert torch.cat(differences).mean() < 2e-3


def test_groups_that_do_not_divide_say_so(tmp_path: Path):
    name = f"model.layers.0.{ROLES['down']}"
    model = write(tmp_path / "model", {name: IntScheme(4, 128, False)})
    words = f"{name}: inputs 384 in units of 128 does not divide among 2 GPUs; serve with another"
    with pytest.raises(AssertionError, match=words):
        ask(tmp_path, model=model, dtype="float32", engine={"tensor_parallel_size": 2}, runs=[])


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_divided_row_keeps_its_factor(ranks: int):
    """E4M3 products of a part are those of the whole, whatever its own largest scale is."""
    from quantize.kernels.int4.decode import decode
    from quantize.vllm.cuts import inputs_cut
    from quantize.vllm.parts import part_of

    N, K, scheme = 32, 512, IntScheme(4, 128, True)
    weight = torch.randn(N, K) * torch.randn(K).exp()
    held = packed(weight, scheme)
    scale = held.tensors()["weight_scale"]
    spread = scale.repeat_interleave(128, dim=1)
    whole = product_weight(held.codes, spread, row_factor(scale))
    for rank in range(ranks):
        cut = inputs_cut(N, K, scheme, rank, ranks, "x")
        part = part_of("x", cut, scheme, torch.float32)
        for suffix, tensor in held.tensors().items():
            part.load(suffix, tensor)
        part.check()
        part.prepare(torch.float32)
        packed_, own = part.weight_packed, part.weight_scale
        found = decode(packed_, own, 4, K // ranks, True, torch.float32, part.factor)
        assert torch.equal(found, whole[:, cut.inputs])
