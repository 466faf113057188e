"""What is put away while nothing needs it comes back as it was, and changes no byte of the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import resumed
import torch
from conftest import ModelMaker
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantize.block.block import Block
from quantize.block.measure import moments_of
from quantize.block.teacher import freeze_layer
from quantize.conversion.loop import Request, convert
from quantize.errors import OutputError
from quantize.files.offload import OnHost, Parking, Place, Spilled, place_states, shared_copy
from quantize.recipe.recipe import load_recipe

CPU = torch.device("cpu")


def batches(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 5, 7, generator=generator).to(dtype) for n in (4, 4, 2, 1)]


def resident(tensor: Tensor) -> int:
    """Bytes of a mapped tensor that are in memory."""
    found = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and rest.strip():
            start, _, end = first.partition("-")
            inside = int(start, 16) <= tensor.data_ptr() < int(end, 16)
        elif inside and line.startswith("Rss:"):
            found = 1024 * int(line.split()[1])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spilled_states_read_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype):
    given = batches(dtype)
    spilled = Spilled(tmp_path, given)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    assert len(spilled) == len(given)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(spilled, given, strict=True))
    assert [len(part) for part in spilled[1:3]] == [4, 2]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(["set", "del"]), st.integers(0, 9), st.integers(0, 4)),
        max_size=12,
    )
)
def test_spilled_states_behave_like_a_list(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
):
    given = batches()
    spilled = Spilled(tmp_path_factory.mktemp("spill"), given)
    for number, (step, index, size) in enumerate(steps):
        if not given:
            break
        index %= len(given)
        if step == "del":
            del given[index], spilled[index]
        else:
            given[index] = torch.full((size, 5, 7), float(number))
            spilled[index] = given[index]
        assert len(spilled) == len(given)
        assert all(torch.equal(a, b) for a, b in zip(spilled, given, strict=True))


def test_a_state_larger_than_its_room_is_refused(tmp_path: Path):
    spilled = Spilled(tmp_path, batches())
    with pytest.raises(ValueError, match="room"):
        spilled[1] = torch.zeros(4096, 5, 7)


def test_batches_of_all_sizes_are_spilled(tmp_path: Path):
    given = [torch.full((n, 50, 7), float(n)) for n in (1, 0, 64, 3)]
    assert all(torch.equal(a, b) for a, b in zip(Spilled(tmp_path, given), given, strict=True))


def test_a_folder_that_cannot_hold_states_is_named(tmp_path: Path):
    with pytest.raises(OutputError, match="missing"):
        Spilled(tmp_path / "missing", batches())


def test_every_place_gives_the_same_states(tmp_path: Path):
    given = batches()
    for place in ("device", "host", "disk"):
        held = place_states(iter(given), place, tmp_path)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(held, given, strict=True))
    assert isinstance(place_states(given, "host", None), OnHost)


def layer(width: int = 512) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 3)
    ).requires_grad_(False)


def test_weights_in_files_are_what_they_were_and_leave_the_memory(tmp_path: Path):
    module, x = layer(), torch.randn(4, 512)
    expected, first, small = module(x), module[0].weight.clone(), module[2].weight.data_ptr()
    parking = Parking(CPU, tmp_path)
    parking.away(module)
    assert list(tmp_path.iterdir()) == []
    weight = module[0].weight
    assert module[2].weight.data_ptr() == small  # too small to be worth it
    assert resident(weight) == 0
    assert torch.equal(weight, first)
    assert resident(weight) >= 512 * 512 * 4
    assert torch.equal(module(x), expected)
    assert resident(weight) == 0


def test_weights_that_were_replaced_are_put_away_anew(tmp_path: Path):
    module, parking = layer(), Parking(CPU, tmp_path)
    parking.away(module)
    before = module[0].weight.data_ptr()
    module[0].weight.data = module[0].weight * 2
    doubled = module[0].weight.clone()
    parking.away(module)
    assert torch.equal(module[0].weight, doubled)
    assert module[0].weight.data_ptr() != before
    kept_at = module[0].weight.data_ptr()
    parking.away(module)
    assert module[0].weight.data_ptr() == kept_at


def test_a_shared_copy_takes_no_memory_and_keeps_its_weights(tmp_path: Path):
    module = layer()
    copied = shared_copy(module)
    assert copied[0].weight.data_ptr() == module[0].weight.data_ptr()
    assert copied[1].weight.data_ptr() != module[1].weight.data_ptr()
    before = copied[0].weight.clone()
    module[0].weight.data = module[0].weight * 2
    module[1].weight.data.mul_(2)
    assert torch.equal(copied[0].weight, before)
    assert float(copied[1].weight.max()) == 1
    parking = Parking(CPU, tmp_path)
    parking.away(copied)
    assert shared_copy(copied)[0].weight.data_ptr() == copied[0].weight.data_ptr()


def test_a_block_computes_the_same_with_its_weights_put_away(
    make_block: Callable[..., Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("quantize.files.offload._LEAST", 1)  # the weights of tests are small
    plain, split = make_block("llama", with_parent=True), make_block("llama", with_parent=True)
    split.parking = Parking(CPU, tmp_path)
    for block in (plain, split):
        freeze_layer(block)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        ours, theirs = (
            moments_of(block, name, False, with_parent=True) for block in (plain, split)
        )
        assert torch.equal(ours.hessian, theirs.hessian)


STACKS = {
    "rtn": "{method: rtn}",
    "fireq": "{method: awq, grid: 3}, {method: fireq-attention, group_size: 32}, {method: fireq}",
    "sbvr": "{method: sbvr, lines: 16, sweeps: 1}",
    "rotate": "{method: rotate, down: true}, {method: gptq, group_size: 32}",
    "ladimo": "{method: ladimo, mean_experts: [1, null], shared: 128, experts: 2, steps: 2, batch_tokens: 32}, "
    "{method: gptq, group_size: 32}",
}


@pytest.mark.parametrize(
    ("model", "stack"),
    [
        *(("llama", stack) for stack in STACKS),
        *(("qwen2_moe", stack) for stack in STACKS if stack != "sbvr"),
        pytest.param("qwen2_moe", "sbvr", marks=pytest.mark.slow),
    ],
)
def test_places_change_no_byte_of_the_output(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, stack: str, model: str
):
    if stack == "ladimo" and model != "llama":
        pytest.skip("experts stay what they are")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"description: d\nformat: pq\ncalibration: {{dataset: {text_file}, nsamples: 5, seqlen: 48}}\n"
        f"stages: [{STACKS[stack]}]\n"
    )
    request = Request(
        tiny(model),
        load_recipe(str(recipe)),
        tmp_path / "plain",
        CPU,
        torch.float32,
        batch_tokens=96,
    )
    convert(request)
    convert(replace(request, output=tmp_path / "away", states_on="disk", split=True))
    files = {path.name for path in (tmp_path / "plain").iterdir()}
    assert files == {path.name for path in (tmp_path / "away").iterdir()}
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "away" / name
        ).read_bytes(), name


@pytest.mark.parametrize("first", ["disk", "device"])
def test_a_stopped_run_goes_on_in_another_place(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Place
):
    monkeypatch.setattr("quantize.files.offload._LEAST", 1)
    asked = resumed.request(
        "fireq",
        tiny("llama", num_hidden_layers=resumed.BLOCKS),
        text_file,
        tmp_path / "out",
        work=tmp_path / "work",
        resume="auto",
        states_on=first,
        split=first == "disk",
    )
    resumed.stopped_after(asked, 2)
    assert {path.name.partition("-")[0] for path in (tmp_path / "work").iterdir()} == {
        "state.json",
        "state",
        "partial",
    }
    other: Place = "device" if first == "disk" else "disk"
    convert(replace(asked, states_on=other, split=other == "disk", resume="required"))
    assert resumed.files_of(tmp_path / "out") == resumed.whole(asked)
