"""The report: what files and evaluations say is what it shows; what is absent, it asks for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from report_samples import (
    LINEARS,
    Page,
    add_everything,
    evaluation,
    headlines,
    provenance,
    save,
    section,
    statistics,
    task_run,
    titled,
    titles,
    write_checkpoint,
)
from typer.testing import CliRunner

from quantize.cli.report import report as report_command
from quantize.errors import ModelError
from quantize.report import as_json, collect, render
from quantize.report.model import Group, Passages


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_everything(write_checkpoint(tmp_path_factory.mktemp("full") / "demo", 6), 6)


@pytest.fixture(scope="module")
def html(full: Path) -> str:
    return render(collect(full))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "demo", 2)


def test_the_figures_of_the_files_are_the_figures_of_the_report(full: Path, html: str):
    report = collect(full)
    shown = headlines(report)
    assert shown["Perplexity"] == 88.17
    assert shown["KL divergence"] == 0.0045
    assert shown["Same top-1"] == 0.944
    assert shown["Bits per weight"] == 4.125
    assert shown["Conversion"] == 88.7
    assert shown["Size on disk"] == (full / "model.safetensors").stat().st_size
    page = Page(html).text
    for words in (
        "88.17",
        "parent 87.80 (+0.42 %)",
        "0.0045",
        "94.4 %",
        "strided-512, wikitext2-test.txt, 60 windows",
    ):
        assert words in page
    assert "30,660 predicted tokens, kernel numerics, float32, parent yardstick" in page
    assert "27 %" in page  # exp(-1.3), what the parent gave the worst token


def test_every_part_is_there(full: Path, html: str):
    report = collect(full)
    everything = {s["id"]: titles(report, s["id"]) for s in as_json(report)["sections"]}
    position, spread = "By position in the window", "KL divergence of single tokens"
    tables = ["All saved evaluations", "Per word and per byte"]
    assert everything == {
        "quality": [*tables, spread, position, spread, position],
        "tasks": ["demo"],
        "tradeoff": ["note"],
        "tokens": ["Largest KLD", "Largest KLD"],
        "errors": ["Relative output error", "Worst layers"],
        "outliers": ["Activations", "Most uneven inputs", "Weights"],
        "weights": [
            "Where the bytes are",
            "Bytes by part",
            "note",  # 4 bits everywhere
            "Weights against the code points",
        ],
        "methods": ["Gain of the scale search", "Share of the weight error that inputs see"],
        "use": ["Loads in", "What next"],
        "provenance": ["Command", "Calibration", "Source", "Versions", "Recipe"],
    }
    page = Page(html)
    links = {a["href"] for a in page.all("a")}
    assert links == {"#summary", *(f"#{key}" for key in everything)}
    assert {s.get("id") for s in page.all("section")} == {"summary", *everything}


def test_the_error_map_holds_every_layer_at_its_place(full: Path):
    recorded = json.loads((full / "pq.json").read_text())["layers"]
    drawn = section(collect(full), "errors")["items"][0]
    assert drawn["columns"] == [str(i) for i in range(6)]
    assert drawn["rows"] == list(LINEARS)
    for r, name in enumerate(LINEARS):
        for i in range(6):
            assert drawn["values"][r][i] == recorded[f"model.layers.{i}.{name}"]["output_error"]


def test_errors_of_weights_where_no_outputs_were_measured(tmp_path: Path):
    layers = {
        n: {"weight_error": f["weight_error"]}
        for n, f in provenance(2)["layers"].items()
        if "weight_error" in f
    }
    report = collect(write_checkpoint(tmp_path / "d", 2, layers=layers, calibration=None))
    assert titles(report, "errors") == ["Relative weight error", "Worst layers"]
    layers["model.layers.0.mlp.up_proj"]["output_error"] = 0.1
    report = collect(write_checkpoint(tmp_path / "e", 2, layers=layers))
    assert titles(report, "errors") == [
        "Relative output error",
        "Relative weight error",
        "Worst layers",
    ]


def test_outliers_are_ratios_before_and_after(full: Path):
    data = json.loads((full / "pq-statistics.json").read_text())["blocks"]
    activations, _, weights = section(collect(full), "outliers")["items"]
    first = activations["pictures"][0]
    assert first["title"] == "self_attn.q_proj, k_proj, v_proj"
    for moment in ("before", "after"):
        expected = [b["inputs"]["self_attn.q_proj"][moment] for b in data]
        assert first["series"][moment] == [p["absmax"] / p["median"] for p in expected]
    last = weights["pictures"][-1]
    expected = [b["weights"]["mlp.down_proj"]["after"] for b in data]
    assert last["series"]["after"] == [w["absmax"] / w["rms"] for w in expected]


def test_experts_share_rows_and_curves(converted: Callable[..., Path], tmp_path: Path):
    folder = Path(
        shutil.copytree(converted("rtn", "qwen2_moe", "ignore=*.experts.1.*"), tmp_path / "experts")
    )
    data = json.loads((folder / "pq-statistics.json").read_text())
    maxima = {f"mlp.experts.{e}.gate_proj": [3.0, 8.0, 5.0, 4.0][e] for e in range(4)} | {
        "self_attn.q_proj": 2.0
    }
    data["blocks"][0]["inputs"] = {
        name: {
            "before": {"absmax": largest, "median": 1.0},
            "after": {"absmax": 1.0, "median": 1.0},
        }
        for name, largest in maxima.items()
    }
    (folder / "pq-statistics.json").write_text(json.dumps(data))
    report = collect(folder)
    activations, channels, weights = section(report, "outliers")["items"]
    assert [p["title"] for p in activations["pictures"]] == [
        "mlp.experts.*.gate_proj, up_proj", "self_attn.q_proj, k_proj, v_proj"
    ]  # fmt: skip
    assert activations["pictures"][0]["series"]["before"] == [8.0, None]
    assert channels["rows"][0][0] == "mlp.experts.1.gate_proj, up_proj"
    assert len(channels["rows"]) == 2
    assert (
        len(weights["pictures"]) == 4 + 3 + 3 + 3
    )  # attention, routed experts, the shared one, a dense FFN
    bits = titled(report, "weights", "Bits")
    row = bits["rows"].index("mlp.experts.*.up_proj")
    assert bits["values"][row] == [(3 * 4 + 16) / 4, None]
    assert bits["values"][bits["rows"].index("mlp.up_proj")] == [None, 4]


def test_without_smoothing_there_is_one_curve(bare: Path):
    data = statistics(2)
    for block in data["blocks"]:
        for part in ("inputs", "weights"):
            for found in block[part].values():
                found["after"] = found["before"]
    (bare / "pq-statistics.json").write_text(json.dumps(data))
    for item in (section(collect(bare), "outliers")["items"][i] for i in (0, 2)):
        assert all(list(p["series"]) == ["as in the parent"] for p in item["pictures"])


def test_data_free_recipes_have_no_activations(bare: Path):
    data = statistics(2)
    for block in data["blocks"]:
        del block["inputs"]
    (bare / "pq-statistics.json").write_text(json.dumps(data))
    assert titles(collect(bare), "outliers") == ["note", "Weights"]


def test_the_bits_map_knows_what_stays_16_bit(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "d", 2)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.1.mlp.up_proj")
    (folder / "config.json").write_text(json.dumps(config))
    bits = titled(collect(folder), "weights", "Bits")
    assert bits["values"][LINEARS.index("mlp.up_proj")] == [4, 16]
    assert bits["values"][LINEARS.index("mlp.down_proj")] == [4, 4]


def test_histograms_mark_the_codes(full: Path):
    group = titled(collect(full), "weights", "Weights against the code points")
    assert [p["title"] for p in group["pictures"]] == [
        f"{r}, 4-bit g128" for r in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    assert group["pictures"][0]["points"] == list(range(-8, 8))


def test_the_leading_evaluation_is_against_the_parent_in_kernel_numerics(bare: Path):
    save(
        bare,
        "a",
        evaluation(
            baseline=None, baseline_perplexity=None, kld_mean=None, perplexity=1.0, tokens=10**6
        ),
    )
    save(bare, "b", evaluation(numerics="stock", perplexity=2.0, tokens=10**5))
    save(bare, "c", evaluation(perplexity=3.0, tokens=100))
    save(bare, "d", evaluation(perplexity=4.0, tokens=200))
    report = collect(bare)
    assert headlines(report)["Perplexity"] == 4.0
    assert "200 predicted tokens" in report.basis
    rows = section(report, "quality")["items"][0]["rows"]
    assert next(row for row in rows if row[0] == "perplexity")[1:] == [
        "4.000",
        "3.000",
        "2.000",
        "1.000",
    ]


def test_an_evaluation_without_parent_asks_for_one(bare: Path):
    nothing = {k: None for k in evaluation() if k.startswith(("kld", "baseline", "top1", "delta"))}
    alone = evaluation(**nothing, worst=[])
    alone["by_position"] |= {"kld": None, "baseline_nll": None}
    save(bare, "a", alone)
    report = collect(bare)
    assert set(headlines(report)) == {"Bits per weight", "Size on disk", "Perplexity"}
    assert "no parent" in report.basis
    note = section(report, "quality")["items"][-1]
    assert note["command"] == f"pq eval {bare} --baseline path/to/parent"
    assert titles(report, "tokens") == ["note"]
    Page(render(report))


def test_what_is_absent_names_the_command_that_adds_it(bare: Path):
    report = collect(bare)
    commands = {
        item["command"]
        for s in as_json(report)["sections"]
        for item in s["items"]
        if item["kind"] == "note" and item["command"]
    }
    assert commands == {
        f"pq eval {bare} --baseline path/to/parent",
        f"pq eval {bare} --baseline path/to/parent --tasks arc_easy,piqa",
        f"pq convert --model path/to/parent --recipe fireq --output {bare}-anew",
    }
    text = Page(render(report)).text
    assert all(command in text for command in commands)
    assert report.basis == ""


def test_tasks_with_and_without_a_parent(bare: Path):
    alone = task_run()
    del alone["scores"]
    save(bare, "tasks-a", task_run())
    save(bare, "tasks-b", alone)
    compared, single = section(collect(bare), "tasks")["items"]
    assert compared["rows"][0][-1] == "0.9860 ± 0.0210"
    assert "recovery" not in single["columns"]
    assert single["rows"] == [["arc_easy", "acc", 500.0, "0.4120 ± 0.0210"]]


def test_warnings_name_what_went_wrong(tmp_path: Path):
    layers = provenance(4)["layers"]
    layers["model.layers.3.mlp.up_proj"]["output_error"] = 0.9
    layers["model.layers.2.mlp.up_proj"]["fallback"] = "Hessian is not finite"
    folder = write_checkpoint(tmp_path / "d", 4, layers=layers, dropped_sequences=3)
    save(folder, "a", evaluation(perplexity=100.0))
    fallen, dropped, worst, perplexity = collect(folder).warnings
    assert "model.layers.2.mlp.up_proj: Hessian is not finite" in fallen
    assert dropped.startswith("3 calibration sequences")
    assert "median output error: model.layers.3.mlp.up_proj." in worst
    assert "14 %" in perplexity
    assert not collect(write_checkpoint(tmp_path / "e", 4)).warnings


def test_the_summary_is_the_last_of_the_log(bare: Path):
    log = bare.with_name("demo.log")
    log.write_text(
        'x INFO summary {"seconds": 1}\nx INFO summary {"seconds": 2.5}\n{"seconds": 9}\n'
    )
    assert headlines(collect(bare))["Conversion"] == 2.5
    log.write_text("x INFO summary {broken\n")
    assert "Conversion" not in headlines(collect(bare))


def test_a_recipe_of_another_version_only_costs_the_methods_pictures(tmp_path: Path):
    recipe = {"name": "new", "resolved": "description: x\nstages:\n- method: teleport\n"}
    report = collect(write_checkpoint(tmp_path / "d", 2, recipe=recipe))
    (note,) = section(report, "methods")["items"]
    assert "teleport" in note["text"]
    assert titles(report, "errors") == ["Relative output error", "Worst layers"]


def test_a_folder_that_pq_did_not_write_is_one_clear_line(tmp_path: Path):
    with pytest.raises(
        ModelError, match=r"has no pq\.json, so pq did not write it; give the output folder"
    ):
        collect(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        collect(tmp_path / "nowhere")
    (tmp_path / "pq.json").write_text("[]")
    with pytest.raises(ModelError, match=r"pq\.json"):
        collect(tmp_path)
    (tmp_path / "pq.json").write_text('{"pq": "0.1.0"}')
    with pytest.raises(ModelError, match=r"pq\.json"):
        collect(tmp_path)


def test_the_command_writes_on_stderr_and_prints_json_on_stdout(full: Path, tmp_path: Path):
    app = typer.Typer()
    app.command()(report_command)
    page = tmp_path / "a.html"
    quiet = CliRunner().invoke(app, [str(full), "--output", str(page)])
    assert (quiet.exit_code, quiet.stdout) == (0, "")
    assert f"{page} and a.json written" in quiet.stderr
    spoken = CliRunner().invoke(app, [str(full), "--output", str(page), "--json"])
    assert json.loads(spoken.stdout) == json.loads((tmp_path / "a.json").read_text())


def test_a_real_conversion_has_a_report(converted: Any, tmp_path: Path):
    for recipe in ("rtn", "fireq"):
        report = collect(converted(recipe, "llama"))
        assert headlines(report)["Bits per weight"] == 4.125
        found = section(report, "errors")["items"][0]
        assert all(value is not None for row in found["values"] for value in row)
        assert not [w for w in report.warnings if "cannot be read" in w]
        Page(render(report))
    assert titles(collect(converted("fireq", "llama")), "methods")[0] == "Gain of the scale search"


def test_groups_and_passages_are_folded_but_for_the_leading_evaluation(full: Path, html: str):
    for kind in (Group, Passages):
        found = [
            i
            for s in collect(full).sections
            if s.id in ("quality", "tokens")
            for i in s.items
            if isinstance(i, kind)
        ]
        assert [i.folded for i in found] == [False, True]
    assert len(Page(html).all("details")) == 2


def test_reports_are_plain_data(full: Path):
    def walk(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
        if isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                walk(part)
        else:
            assert value is None or type(value) in (str, int, float, bool)

    walk(dataclasses.asdict(collect(full)))
