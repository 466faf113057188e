"""What a conversion will take is told before it starts, and limits are kept to or refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CPU, ModelMaker
from resumed import RECIPES, request

from quantize.conversion.estimate import estimate, within
from quantize.conversion.loop import convert
from quantize.cost.units import duration, gigabytes, parse_bytes
from quantize.errors import ModelError, RecipeError, RoomError

Pq = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_estimated(tiny: ModelMaker, text_file: Path, tmp_path: Path, recipe: str):
    model = tiny("llama", num_hidden_layers=3, tie_word_embeddings=recipe == "rotate-rtn")
    found = estimate(request(recipe, model, text_file, tmp_path / "out"), timed=False)
    assert found.ram > sum(found.parts.values()) * 0.99
    assert found.vram == 0
    assert found.time is None


def test_the_size_of_the_output_is_that_of_the_output(
    tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    for recipe in ("rtn", "gptq", "rotate-rtn"):
        asked = request(
            "format: compressed-tensors, stages: [{method: rtn, group_size: 32}]"
            if recipe == "rtn"
            else recipe,
            tiny("llama", num_hidden_layers=3, tie_word_embeddings=recipe == "rotate-rtn"),
            text_file,
            tmp_path / recipe,
        )
        told, made = estimate(asked, timed=False).output, convert(asked).output_bytes
        assert told == pytest.approx(made, rel=0.3), (
            recipe
        )  # norms and biases of tiny models weigh something


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_what_an_int4_cache_adds_to_the_output_is_counted(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, symmetric: str
):
    model = tiny("llama", num_hidden_layers=3, head_dim=64)
    told, made = [], []
    cache = f"{{method: fireq-attention, symmetric: {symmetric}}}, "
    for stages in ("", cache):
        body = f"format: pq, stages: [{stages}{{method: rtn, group_size: 32}}]"
        asked = request(body, model, text_file, tmp_path / f"out{len(told)}")
        told.append(estimate(asked, timed=False).output)
        made.append(convert(asked).output_bytes)
    assert told == pytest.approx(made, rel=0.3)
    assert told[1] - told[0] == made[1] - made[0]


def test_a_limit_that_suffices_changes_nothing(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    asked = request(
        "gptq", tiny("llama", num_hidden_layers=3), text_file, tmp_path / "out", max_ram=10**12
    )
    assert within(asked) == asked
    assert within(dataclasses.replace(asked, max_ram=None)).states_on == "device"


def test_the_cheapest_measure_that_suffices_is_taken(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("quantize.conversion.estimate.resident", lambda: 0)
    monkeypatch.setattr("quantize.conversion.estimate.peak_resident", lambda: 0)
    asked = request(
        "fireq", tiny("llama", num_hidden_layers=3), text_file, tmp_path / "out", batch_tokens=4096
    )
    plain = estimate(asked, timed=False).ram
    seen = []
    for spared in range(0, plain // 2, 20_000):
        try:
            chosen = within(dataclasses.replace(asked, max_ram=plain - spared))
        except RoomError:
            break
        assert estimate(chosen, timed=False).ram <= plain - spared
        seen.append((chosen.states_on, chosen.split))
    assert seen[0] == ("device", False)
    assert ("disk", True) in seen
    assert seen == sorted(
        seen, key=lambda choice: [("device", False), ("disk", False), ("disk", True)].index(choice)
    )


def test_a_limit_that_cannot_be_kept_names_what_could(
    tiny: ModelMaker, text_file: Path, tmp_path: Path
):
    asked = request(
        "gptq", tiny("llama", num_hidden_layers=3), text_file, tmp_path / "out", max_ram=10**6
    )
    with pytest.raises(
        RoomError, match=r"needs --max-ram \d+\.\d\dGB at least; most of it is"
    ) as refused:
        within(asked)
    needed = parse_bytes(str(refused.value).split("--max-ram ")[1].split()[0])
    within(dataclasses.replace(asked, max_ram=int(needed * 1.2)))
    assert not (tmp_path / "out").exists()


def test_a_limit_changes_no_byte(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    model = tiny("llama", num_hidden_layers=3)
    plain = request("fireq", model, text_file, tmp_path / "plain")
    convert(plain)
    convert(dataclasses.replace(plain, output=tmp_path / "spared", states_on="disk", split=True))
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert all(
        (tmp_path / "plain" / n).read_bytes() == (tmp_path / "spared" / n).read_bytes()
        for n in names
    )


def test_what_convert_refuses_is_refused(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    asked = request(
        "format: compressed-tensors, stages: [{method: rtn, group_size: 48, strict: true}]",
        tiny("llama"),
        text_file,
        tmp_path / "o",
    )
    with pytest.raises(ModelError, match="multiple of the group 48"):
        estimate(asked, timed=False)


def test_without_time_nothing_is_loaded(
    pq: Pq, tiny: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*_: object) -> torch.Tensor:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("quantize.files.checkpoint.Checkpoint.tensor", never)
    monkeypatch.chdir(tmp_path)
    arguments = (
        "-m",
        str(tiny("llama")),
        "-r",
        "rtn",
        "--set",
        "group_size=32",
        "--device",
        "cpu",
        "--no-time",
    )
    code, out, _ = pq("estimate", *arguments)
    assert code == 0
    assert "RAM" in out
    assert "measured on this machine" not in out
    told = pq("estimate", *arguments, "--json")
    assert json.loads(told[1])["vram"] == 0
    assert json.loads(told[1])["seconds"] is None
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_what_convert_takes(
    pq: Pq, tiny: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, out = str(tiny("llama")), tmp_path / "out"
    arguments = ("estimate", "-m", model, "-r", "rtn", "--set", "group_size=64", "--no-time")
    text = ("--dataset", str(text_file), "--nsamples", "6", "--seqlen", "32", "--device", "cpu")
    plain = json.loads(pq(*arguments, *text, "-o", str(out), "--json")[1])
    assert plain["disk_free"] > plain["disk"]
    more = json.loads(pq(*arguments, *text, "--target-bpw", "7", "--json")[1])
    assert more["output"] > 1.3 * plain["output"]
    assert "disk_free" not in more
    monkeypatch.setattr("quantize.files.disk.free_bytes", lambda path: 1000)
    assert "which is too little" in pq(*arguments, *text, "-o", str(out))[1]
    out.mkdir()
    (out / "pq.json").write_text("{}")
    code, _, err = pq(*arguments, *text, "-o", str(out))
    assert (code, "--overwrite replaces what pq wrote" in err) == (6, True)
    assert pq(*arguments, *text, "-o", str(out), "--overwrite")[0] == 0
    assert pq(*arguments, *text, "-o", model)[0] in (2, 6)
    strict = (*arguments, "--set", "bits=3", "--strict-serving")
    assert pq(*strict)[0] == RecipeError.exit_code
    assert "choose auto" in pq(*arguments, "--resume", "perhaps")[2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_convert_refuses_a_limit_below_the_least(pq: Pq, tiny: ModelMaker, tmp_path: Path):
    arguments = ("-m", str(tiny("llama")), "-r", "rtn", "--set", "group_size=32", "--device", "cpu")
    code, _, err = pq("convert", *arguments, "-o", str(tmp_path / "out"), "--max-ram", "1MB")
    assert code == 8
    assert "needs --max-ram" in err
    assert list(tmp_path.iterdir()) == []
    code, _, err = pq("convert", *arguments, "-o", str(tmp_path / "out"), "--max-ram", "lots")
    assert code == 2
    assert "--max-ram: 'lots' is no size" in err


def test_convert_tells_its_pace_and_its_peak(pq: Pq, tiny: ModelMaker, tmp_path: Path):
    arguments = (
        "-m",
        str(tiny("llama")),
        "-r",
        "rtn",
        "--set",
        "group_size=32",
        "--device",
        "cpu",
        "--json",
    )
    code, out, _ = pq("convert", *arguments, "-o", str(tmp_path / "out"), "--max-ram", "100GB")
    assert code == 0
    summary = json.loads(out)
    assert summary["peak_bytes"] > 10**8
    assert summary["seconds_per_block"] > 0
    log = (tmp_path / "out.log").read_text()
    assert "block 1 of 2: " in log
    assert " left of " in log


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6 * 10**9),
        ("1.5g", 15 * 10**8),
        ("2GiB", 2 << 30),
        ("900 MB", 9 * 10**8),
        ("77", 77),
    ],
)
def test_sizes_are_read(text: str, size: int):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e9", "6 gigabytes", "nan"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)


def test_sizes_and_times_are_shown():
    assert gigabytes(1) == "0.01GB"  # rounded up
    assert parse_bytes(gigabytes(123456789)) >= 123456789
    assert [duration(s) for s in (4.25, 42, 200, 7500)] == [
        "4.2 s",
        "42 s",
        "3 min 20 s",
        "2 h 05 min",
    ]


def test_limits_are_told_apart(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    asked = request(
        "gptq", tiny("llama", num_hidden_layers=3), text_file, tmp_path / "out", max_vram=1
    )
    assert within(asked).device == CPU  # a CPU has none of it
