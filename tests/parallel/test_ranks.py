"""What ranks send each other arrives bit for bit, and sums are those of one process."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BlockMaker
from hypothesis import given
from hypothesis import strategies as st
from processes import REMEDY, launch
from torch import Tensor

from quantize.block.block import Block
from quantize.block.exchange import share_out
from quantize.block.measure import moments_of, routed_sums, sums_of
from quantize.block.moments import Moments
from quantize.block.teacher import freeze_layer
from quantize.methods.gptq import Gptq
from quantize.parallel.launch import join
from quantize.parallel.ranks import ALONE, Ranks

Check = Callable[[Ranks], None]


def of(rank: int, size: int) -> Ranks:
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks


def on_all(size: int, check: Check, folder: Path) -> None:
    """Run a check on all ranks of a launch."""

    def work(rank: int) -> None:
        with join(REMEDY, lambda err: os._exit(97)) as ranks, torch.no_grad():
            assert (ranks.rank, ranks.size) == (rank, size)
            check(ranks)

    running = launch(size, work, folder)
    assert running.wait() == [0] * size, running.texts()


@given(batches=st.integers(0, 20), size=st.integers(1, 6))
def test_rounds_give_every_batch_to_one_rank(batches: int, size: int):
    shares = [list(of(rank, size).rounds(batches)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    seen = [
        b
        for line in zip(*shares, strict=True)
        for rank, (b, present) in enumerate(line)
        if rank < present
    ]
    assert seen == list(range(batches))
    assert all(0 <= b < batches for share in shares for b, _ in share)


@given(sizes=st.lists(st.integers(0, 100), max_size=12), size=st.integers(1, 5))
def test_owners_share_the_load(sizes: list[int], size: int):
    owners = Ranks.owners(of(0, size), sizes)
    loads = [
        sum(s for s, owner in zip(sizes, owners, strict=True) if owner == rank)
        for rank in range(size)
    ]
    # What any order guarantees (Graham 1966).
    assert max(loads) <= sum(sizes) / size + (1 - 1 / size) * max([0, *sizes]) + 1e-9


def test_one_alone_needs_no_launch():
    assert ALONE.first
    assert ALONE.gather(3) == [3]
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.numbers([lambda: 1.5, lambda: 2.5]) == [1.5, 2.5]


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_sent_arrives(tmp_path: Path, size: int):
    dtypes = [
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.uint16,
        torch.bool,
        torch.float8_e4m3fn,
    ]

    def check(ranks: Ranks) -> None:
        for source in range(size):
            named = {
                f"{d}.{shape}": torch.arange(math.prod(shape)).view(shape).to(d)
                for d in dtypes
                for shape in [(), (0, 3), (5, 7)]
            }
            named["transposed"] = torch.arange(12.0).view(3, 4).T
            named["odd"] = torch.tensor([float("nan"), float("inf"), -0.0])
            found = ranks.tensors(named if ranks.rank == source else None, source)
            assert list(found) == list(named)
            for name, tensor in named.items():
                assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
                assert (
                    found[name]
                    .flatten()
                    .view(torch.uint8)
                    .equal(tensor.flatten().view(torch.uint8))
                )
            told = {"a": [1, 0.1, None, "ü"], "b": float("inf")}
            assert ranks.tell(told if ranks.rank == source else "nothing", source) == told
        assert ranks.gather(ranks.rank) == list(range(size))
        assert ranks.numbers([lambda i=i: i / 7 for i in range(5)]) == [i / 7 for i in range(5)]  # type: ignore[misc]
        assert ranks.numbers([]) == []
        assert ranks.any(ranks.rank == size - 1)
        assert not ranks.any(False)

    on_all(size, check, tmp_path)


def test_sums_are_those_of_one_process(tmp_path: Path):
    """Parts of such different sizes that every other order gives other bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (5,), (7, 11), (16, 16)]
    parts = {
        n: [torch.randn(s, generator=generator) * 10.0 ** (i % 5) for i in range(n) for s in shapes]
        for n in (1, 2, 3, 7)
    }

    def total(ranks: Ranks, many: list[Tensor]) -> Tensor:
        out = None
        for batch, present in ranks.rounds(len(many)):
            out = ranks.add(out, many[batch].clone(), present)
        assert out is not None
        return ranks.whole(out, many[0].shape)

    def check(ranks: Ranks) -> None:
        for many in parts.values():
            for i in range(len(shapes)):
                mine = many[i :: len(shapes)]
                assert total(ranks, mine).equal(total(ALONE, mine))

    on_all(3, check, tmp_path)


def everything(moments: Moments) -> list[Tensor]:
    found = [moments.hessian, moments.absmean, moments.cross, moments.wanted]
    windows = [] if moments.windows is None else list(vars(moments.windows).values())
    return [one for one in (*found, *windows) if one is not None]


def with_ranks(block: Block, ranks: Ranks) -> Block:
    block.ranks = ranks
    return block


@pytest.mark.parametrize("weights", ["equal", "attention"])
def test_moments_are_those_of_one_process(tmp_path: Path, make_block: BlockMaker, weights: Any):
    def made(ranks: Ranks) -> Block:
        block = with_ranks(make_block("llama", with_parent=True, batches=4), ranks)
        block.inputs[1][0, 3, 5] = float("nan")  # spoils tokens behind it
        assert block.parent_inputs is not None
        block.parent_inputs[2] *= 3
        freeze_layer(block)
        return block

    wanted = {
        name: moments_of(made(ALONE), name, fp8, True, token_weights=weights)
        for name, fp8 in (("self_attn.q_proj", True), ("mlp.down_proj", False))
    }
    assert len(everything(wanted["mlp.down_proj"])) == 3 + 2  # and windows of both

    def check(ranks: Ranks) -> None:
        block = made(ranks)
        for name, moments in wanted.items():
            fp8 = name.endswith("q_proj")
            found = moments_of(block, name, fp8, True, token_weights=weights)
            assert found.tokens == moments.tokens < 4 * 48
            assert all(
                a.equal(b) for a, b in zip(everything(found), everything(moments), strict=True)
            )
        assert (
            block.report["mlp.down_proj"]["dropped_tokens"]
            == 4 * 48 - wanted["mlp.down_proj"].tokens
        )

    on_all(3, check, tmp_path)


def test_experts_that_some_batches_pass_by(tmp_path: Path, make_block: BlockMaker):
    name = "mlp.experts.0.gate_proj"

    def made(ranks: Ranks) -> Block:
        block = with_ranks(make_block("qwen2_moe", batches=5), ranks)
        router = block.module.get_parameter("mlp.gate.weight")
        router[1] *= 0  # its score is always in the middle
        for i, hidden in enumerate(block.inputs):
            block.inputs[i] = hidden[:1, :1]  # one token, which visits two of four experts
        return block

    wanted = routed_sums(made(ALONE), name, False)
    visits = [total.tokens for total in wanted.values()]
    assert min(visits) < 5

    def check(ranks: Ranks) -> None:
        found = routed_sums(made(ranks), name, False)
        assert [total.tokens for total in found.values()] == visits
        for one, other in zip(found.values(), wanted.values(), strict=True):
            assert one.totals["hessian"].equal(other.totals["hessian"])
        many = sums_of(made(ranks), "self_attn.q_proj", False, False)
        assert many.tokens == 5

    on_all(2, check, tmp_path)


def test_every_linear_is_encoded_once(tmp_path: Path, make_block: BlockMaker):
    def encoded(ranks: Ranks) -> tuple[Block, list[str]]:
        block, done = with_ranks(make_block("llama"), ranks), []
        block.note("self_attn.v_proj", before=1)
        stage = Gptq(group_size=64)
        names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]

        def encode(one: Block, mine: list[str], moments: Moments | None) -> None:
            done.extend(mine)
            stage.encode_group(one, mine, moments)

        share_out(block, [(names, stage.measure(block, names[0]))], encode)  # type: ignore[arg-type]
        return block, done

    wanted, _ = encoded(ALONE)

    def check(ranks: Ranks) -> None:
        block, done = encoded(ranks)
        assert sorted(name for mine in ranks.gather(done) for name in mine) == sorted(wanted.packed)
        assert done
        assert block.report == wanted.report
        for table in ("report", "packed", "histograms"):
            assert list(getattr(block, table)) == list(getattr(wanted, table))
        for name, packed in wanted.packed.items():
            assert block.packed[name].unpack().equal(packed.unpack())
            assert block.histograms[name].equal(wanted.histograms[name])

    on_all(2, check, tmp_path)
