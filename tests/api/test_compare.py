"""`quantize.compare` and `pq compare`: from recipes, from folders, and what other tools made."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantize
from quantize.errors import DataError, ModelError, StoppedError, UsageError
from quantize.evaluation import evaluate
from quantize.files.checkpoint import Checkpoint
from quantize.pictures import Table
from quantize.report.exports import comma_separated, latex, markdown

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def how(text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Few windows of a short text, calibration included."""
    return {
        "into": tmp_path / "into",
        "calibration": str(text_file),
        "nsamples": 4,
        "calibration_seqlen": 32,
        "dataset": str(text_file),
        "seqlen": 24,
        "max_windows": 2,
        "device": "cpu",
    }


def broken(folder: Path) -> Path:
    """A recipe whose own text is not there."""
    path = folder / "broken.yaml"
    path.write_text(
        "description: a text that is not there\n"
        "calibration: {dataset: no-such-text.txt, nsamples: 4, seqlen: 32}\n"
        "stages: [{method: gptq, bits: 4, group_size: 128, activations: none}]\n"
    )
    return path


def test_from_recipes_to_table_and_picture(
    tiny: Maker, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    asked = how | {"model": tiny("llama"), "recipes": "rtn, gptq", "say": said.append}
    found = quantize.compare(**asked, output=tmp_path / "page.html")
    assert [row.name for row in found.rows] == [row.recipe for row in found.rows] == ["rtn", "gptq"]
    assert all(row.bits == 4.125 and row.figures.kld_mean > 0 for row in found.rows)
    assert found.parent.bytes > found.rows[0].bytes
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1
    assert "MB of weights read per token" in page
    assert not list((tmp_path / "into").glob("*.work"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "into").rglob("*")}
    monkeypatch.setattr("quantize.api.made.run", None)  # nothing is converted again
    again = quantize.compare(**asked)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "into").rglob("*")} == before
    assert again.rows == found.rows
    assert sum("converted already" in line for line in said) == 2
    with pytest.raises(UsageError, match="rtn: was made with other settings"):
        quantize.compare(**(asked | {"set": {"bits": 3}}))
    with pytest.raises(UsageError, match="rtn: was made of another model"):
        quantize.compare(**(asked | {"model": tiny("mistral")}))
    assert "<table>" in found._repr_html_()


def test_what_was_stopped_goes_on(tiny: Maker, how: dict[str, Any], tmp_path: Path):
    asked = how | {"model": tiny("llama"), "recipes": ["gptq"]}
    with pytest.raises(StoppedError):
        quantize.compare(**asked, stop=lambda: True)
    assert (tmp_path / "into" / "gptq.work").is_dir()
    assert quantize.compare(**asked).rows[0].figures.kld_mean > 0
    assert [p.name for p in (tmp_path / "into").iterdir()] == ["gptq"]


def test_a_recipe_that_fails_is_told_and_the_others_are_measured(
    pq: Call, tiny: Maker, how: dict[str, Any], tmp_path: Path
):
    args = ("compare", "-m", tiny("llama"), "-r", f"{broken(tmp_path)},rtn", "--into", how["into"])
    text = ("--dataset", how["dataset"], "--seqlen", 24, "--max-windows", 2, "--device", "cpu")
    code, out, err = pq(*args, *text, "--output", tmp_path / "page.html")
    assert code == DataError.exit_code
    assert "pq: error: " in err
    assert "no-such-text.txt" in err
    assert "rtn" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "broken: not converted" in (tmp_path / "page.html").read_text()
    with pytest.raises(DataError, match=r"no-such-text\.txt"):
        quantize.compare(
            model=tiny("llama"), recipes=[str(broken(tmp_path))], into=tmp_path / "none"
        )


def test_what_is_printed_for_other_programs(
    pq: Call, converted: Maker, tiny: Maker, text_file: Path
):
    args = ("compare", converted("rtn", "llama", "bits=3"), "--baseline", tiny("llama"))
    args += ("--dataset", text_file, "--seqlen", 24, "--max-windows", 2)
    facts = json.loads(pq(*args, "--json")[1])
    rows = list(csv.DictReader(io.StringIO(pq(*args, "--format", "csv")[1])))
    assert len(rows) == 2
    assert float(rows[1]["KLD mean"]) == facts[0]["kld_mean"]
    assert float(rows[1]["MB/token"]) == facts[0]["bytes_per_token"] / 1e6
    assert rows[1]["recipe"] == facts[0]["recipe"] == "rtn"
    assert "tokens/s" not in rows[1]
    lines = pq(*args, "--format", "markdown")[1].splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    tabular = pq(*args, "--format", "latex")[1]
    assert tabular.startswith(r"\begin{tabular}{l")
    assert tabular.count(r"\\") == 3
    for wrong in (("--format", "html"), ("--format", "csv", "--json")):
        code, out, err = pq(*args, *wrong)
        assert (code, out) == (2, "")
        assert "--format" in err


def test_tables_are_escaped():
    table = Table("", "", ("a_b", "±"), [("x|y & 50 % <b>", None), ("two", 0.5)], ("", ".2f"))
    assert markdown(table).splitlines()[2] == r"| x\|y & 50 % \<b\> | – |"
    assert r"x|y \& 50 \% <b> & -- \\" in latex(table)
    assert r"a\_b & $\pm$ \\" in latex(table)
    assert comma_separated(table).splitlines() == ["a_b,±", "x|y & 50 % <b>,", "two,0.5"]


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
def test_bytes_of_a_token_are_those_of_its_parameters(
    model_type: str, tiny: Maker, text_file: Path
):
    folder = tiny(model_type)
    found = evaluate(folder, None, dataset=str(text_file), seqlen=24, max_windows=2)
    assert found.bytes_per_token == pytest.approx(2 * found.activated_parameters)  # all bfloat16
    if model_type == "llama":
        source = Checkpoint(folder)
        whole = sum(t.nbytes for t in source.tensors("").values())
        assert found.bytes_per_token == whole - source.tensor("model.embed_tokens.weight").nbytes
    assert (found.activation_bits, found.kv_bits) == ((16,), 16.0)


def test_bits_of_weights_activations_and_cache(converted: Maker, text_file: Path, tiny: Maker):
    how = {"dataset": str(text_file), "seqlen": 24, "max_windows": 2}
    plain = evaluate(tiny("llama"), None, **how)
    folder = converted("fireq", "llama")
    packed = evaluate(folder, None, **how)
    maps = sum(t.nbytes for n, t in Checkpoint(folder).tensors("").items() if ".kv." in n)
    assert packed.activation_bits == (8,)
    assert packed.kv_bits == pytest.approx(4 + (16 + 8) / 64)  # a scale and a zero point
    head = 2 * 300 * 128
    linears = plain.bytes_per_token - head
    assert packed.bytes_per_token - head - maps < linears * 0.27
    assert packed.bytes_per_token - head - maps > linears * 4 / 16


def of_another_tool(folder: Path, copy: Path, **changes: Any) -> Path:
    """A packed checkpoint as another tool names its linears, which pq does not read."""
    shutil.copytree(folder, copy)
    for name in ("pq.json", "pq-statistics.json"):
        (copy / name).unlink()
    config = json.loads((copy / "config.json").read_text())
    section = config["quantization_config"]
    (group,) = section["config_groups"].values()
    group["targets"] = ["re:.*(q|k|v|o|gate|up|down)_proj$"]
    config["quantization_config"] = section | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_other_tools_stand_beside_ours(
    converted: Maker, tiny: Maker, text_file: Path, tmp_path: Path
):
    ours = converted("rtn", "llama")
    theirs = of_another_tool(ours, tmp_path / "theirs")
    found = quantize.compare(
        [ours, theirs],
        tiny("llama"),
        dataset=str(text_file),
        seqlen=24,
        max_windows=2,
        device="cpu",
        numerics="stock",
    )
    mine, other = found.rows
    assert other.recipe is None
    assert other.bits == pytest.approx(mine.bits, rel=0.01)
    assert other.figures.kld_mean == pytest.approx(mine.figures.kld_mean, rel=0.02)
    assert other.figures.bytes_per_token == pytest.approx(mine.figures.bytes_per_token, rel=0.01)
    refused = of_another_tool(ours, tmp_path / "refused", quant_method="gptq", bits=4)
    with pytest.raises(ModelError, match=r"gptq.*; .*transformers does not load this model here"):
        evaluate(refused, None, dataset=str(text_file), seqlen=24, max_windows=2)


def test_speed_is_measured_where_asked(converted: Maker, tiny: Maker, text_file: Path):
    found = quantize.compare(
        [converted("rtn", "llama")],
        tiny("llama"),
        dataset=str(text_file),
        seqlen=24,
        max_windows=1,
        device="cpu",
        speed=True,
    )
    assert found.rows[0].tokens_per_second > 0
    assert found.parent.tokens_per_second > 0
    assert "tokens/s" in found.table.columns
    assert any("one sequence in transformers, cpu, float32" in note for note in found.notes)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"models": ["a"]}, "name the parent"),
        ({"model": "a", "baseline": "b"}, "both name the parent"),
        ({"model": "a"}, "--recipes a,b,c"),
        ({"recipes": "rtn", "baseline": "a"}, "--model"),
        ({"baseline": "a"}, "name the folders"),
        ({"models": ["a"], "baseline": "b", "into": "c"}, "--into"),
        ({"models": ["a"], "baseline": "b", "output": "page.pdf"}, "html"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: dict[str, Any], says: str):
    with pytest.raises(UsageError, match=says):
        quantize.compare(**arguments)


def test_a_recipe_that_is_named_twice(tiny: Maker, how: dict[str, Any]):
    with pytest.raises(UsageError, match="rtn: is named twice"):
        quantize.compare(**how, model=tiny("llama"), recipes=["rtn", "rtn"])
