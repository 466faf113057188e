"""What a conversion says of its own quality: in every format, taken up or not, and never in its way."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, ModelMaker, request_for

from quantize.calibration.tokens import TokenSet
from quantize.conversion import held_out as held_out_module
from quantize.conversion.estimate import estimate, within
from quantize.conversion.loop import Summary, convert
from quantize.conversion.request import Request
from quantize.errors import StoppedError
from quantize.evaluation import evaluate
from quantize.files.provenance import read_provenance


def checked(model: Path, recipe: str, output: Path, text: Path, **changes: Any) -> Request:
    request = request_for(model, recipe, output, text)
    return dataclasses.replace(request, check_windows=2, **changes)


def record(output: Path) -> dict[str, Any]:
    found = read_provenance(output)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "recipe",
    ["rtn", "gptq", "fireq-kv", pytest.param("sbvr", marks=pytest.mark.slow), "gguf-q4_0"],
)
def test_of_every_format(tiny: ModelMaker, text_file: Path, tmp_path: Path, recipe: str):
    summary = convert(checked(tiny("llama"), recipe, tmp_path / "out", text_file))
    found = summary.held_out
    assert found is not None
    assert found == record(tmp_path / "out")["held_out"]
    assert 0 < found["kld_mean"] < 10
    assert found["windows"] == 2
    assert ("llama.cpp rounds" in found["measured"]) == (recipe == "gguf-q4_0")
    assert ("int4" in found["measured"]) == (recipe == "fireq-kv")
    if recipe == "rtn":  # which reads no text: the windows are those that pq eval begins with
        later = evaluate(
            tmp_path / "out",
            tiny("llama"),
            seqlen=found["seqlen"],
            max_windows=2,
            bos="auto",
            device=CPU,
        )
        assert found["sha256"] == later.data_sha256
        assert found["kld_mean"] == pytest.approx(later.kld_mean, rel=1e-6)
    else:
        assert found["text"].endswith("windows that calibration did not use")
        assert found["sha256"] != record(tmp_path / "out")["calibration"]["sha256"]


def test_nothing_else_changes(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    records = []
    for windows in (0, 3):
        request = request_for(tiny("llama"), "gptq", tmp_path / f"{windows}", text_file)
        summary = convert(dataclasses.replace(request, check_windows=windows))
        assert (summary.held_out is None) == (windows == 0)
        records.append(record(tmp_path / f"{windows}"))
    plain, looked = records
    assert "held_out" not in plain
    names = {n for n in plain["files"] if plain["files"][n] != looked["files"][n]}
    assert names == {"README.md"}
    assert plain["layers"] == looked["layers"]


def test_taken_up_it_says_the_same(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    request = checked(
        tiny("llama"), "gptq", tmp_path / "out", text_file, work=tmp_path / "work", resume="auto"
    )
    with pytest.raises(StoppedError):
        convert(request, stop=lambda: True)
    taken_up = convert(request)
    whole = convert(checked(tiny("llama"), "gptq", tmp_path / "whole", text_file))
    assert taken_up.held_out == whole.held_out
    assert record(tmp_path / "out") == record(tmp_path / "whole")


def test_without_a_tokenizer_it_says_so(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    for path in model.glob("tokenizer*"):
        path.unlink()
    found = convert(checked(model, "rtn", tmp_path / "out", text_file)).held_out
    assert found is not None
    assert set(found) == {"not_measured"}
    assert "the parent: no usable tokenizer" in found["not_measured"]
    assert str(tmp_path) not in str(record(tmp_path / "out"))


def test_a_failure_costs_no_output(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*args: object, **how: object) -> None:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(held_out_module, "look", fails)
    summary = convert(checked(tiny("llama"), "rtn", tmp_path / "out", text_file))
    assert summary.held_out == {"not_measured": "RuntimeError: out of luck"}
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_a_text_that_ends_is_replaced(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    request = checked(tiny("llama"), "gptq", tmp_path / "out", text_file)
    tokens = TokenSet(torch.zeros(2, 48, dtype=torch.int64), "", "s", {"bos_token_id": None})
    assert tokens.held_out is None
    plan = dataclasses.make_dataclass("Plan", ["request", "recipe", "shape", "source"])(
        request, request.recipe, dataclasses.make_dataclass("Shape", ["vocab"])(300), None
    )
    text = held_out_module._text(plan, tokens)
    assert text.tokens.shape == (2, 48)
    assert "built-in" in text.source


def test_a_limit_leaves_the_look_out_and_says_so(
    tiny: ModelMaker, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    request = checked(tiny("llama"), "rtn", tmp_path / "out", text_file)
    found = estimate(request, timed=False)
    assert found.check > 0
    assert estimate(dataclasses.replace(request, check_windows=0), timed=False).check == 0
    wide = within(dataclasses.replace(request, max_ram=found.check * 2))
    assert (wide.check_windows, wide.unchecked) == (2, "")


def test_the_worst_linear_and_its_remedy(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    summary = convert(request_for(tiny("llama"), "gptq", tmp_path / "out", text_file))
    layers = record(tmp_path / "out")["layers"]
    worst = _worst(summary)
    errors = {
        name: facts["output_error"] for name, facts in layers.items() if "output_error" in facts
    }
    assert worst["value"] == max(errors.values())
    assert errors[worst["name"]] == worst["value"]
    assert summary.bits_per_weight < worst["target_bpw"] <= 8
    assert worst["recipe"] is None  # it is fitted to its inputs already
    again = request_for(tiny("llama"), "gptq", tmp_path / "more", text_file)
    more = convert(dataclasses.replace(again, target_bpw=worst["target_bpw"]))
    assert more.promoted
    assert more.bits_per_weight > summary.bits_per_weight


@pytest.mark.slow
def test_other_remedies(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    rounded = convert(request_for(tiny("llama"), "rtn", tmp_path / "rtn", text_file))
    assert _worst(rounded)["recipe"] == "gptq"
    assert _worst(rounded)["error"] == "weight_error"
    vectors = convert(request_for(tiny("llama"), "sbvr", tmp_path / "sbvr", text_file))
    worst = _worst(vectors)
    assert worst["target_bpw"] is None
    assert worst["name"] in worst["ignore"]
    field = f"{worst['method']}.ignore={','.join(worst['ignore'])}"
    again = convert(request_for(tiny("llama"), "sbvr", tmp_path / "ignored", text_file, field))
    assert again.quantized_linears == vectors.quantized_linears - len(worst["ignore"])


def _worst(summary: Summary) -> dict[str, Any]:
    assert summary.hurt_most is not None
    return summary.hurt_most
