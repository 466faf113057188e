"""The report: everything that is there is shown, nothing that is there can break the page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_samples import (
    HOSTILE,
    LINEARS,
    add_everything,
    evaluation,
    provenance,
    rolling,
    statistics,
    task_run,
    write_checkpoint,
)
from typer.testing import CliRunner

from quantize.cli.report import report as report_command
from quantize.errors import ModelError, OutputError, UsageError
from quantize.methods import STAGES
from quantize.methods.awq import Awq
from quantize.methods.fireq import Fireq
from quantize.methods.rtn import Rtn
from quantize.pictures import Bars, Heatmap, Histogram, Lines, Picture, Scatter, Table, block_map, facts, place_of
from quantize.report import Report, as_json, collect, render, write
from quantize.report.draw import Frame, shares, shown, y_range
from quantize.report.html import cell, visible
from quantize.report.model import Group, Passages
from quantize.report.svg import svg


class Page(HTMLParser):
    """Tags with their attributes and the text outside style sheets; insists that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def save(folder: Path, name: str, data: Any) -> None:
    results = folder.with_name(folder.name + ".eval")
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")


def section(report: Report, identity: str) -> dict[str, Any]:
    return next(s for s in as_json(report)["sections"] if s["id"] == identity)


def titles(report: Report, identity: str) -> list[str]:
    return [item.get("title", item["kind"]) for item in section(report, identity)["items"]]


def headlines(report: Report) -> dict[str, float | None]:
    return {headline.label: headline.number for headline in report.headlines}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_everything(write_checkpoint(tmp_path_factory.mktemp("full") / "demo", 6), 6)


@pytest.fixture(scope="module")
def html(full: Path) -> str:
    return render(collect(full))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "demo", 2)


# What is on the page


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
    for words in ("88.17", "parent 87.80 (+0.42 %)", "0.0045", "94.4 %", "strided-512, wikitext2-test.txt, 60 windows"):
        assert words in page
    assert "30,660 predicted tokens, kernel numerics, float32, parent yardstick" in page
    assert "27 %" in page  # exp(-1.3), what the parent gave the worst token


def test_every_part_is_there(full: Path, html: str):
    report = collect(full)
    everything = {s["id"]: titles(report, s["id"]) for s in as_json(report)["sections"]}
    position = "By position in the window"
    assert everything == {
        "quality": ["All saved evaluations", "Per word and per byte", position, position],
        "tasks": ["demo"],
        "tokens": ["Largest KLD", "Largest KLD"],
        "errors": ["Relative output error", "Worst layers"],
        "outliers": ["Activations", "Most uneven inputs", "Weights"],
        "weights": ["Bits", "Weights against the code points"],
        "methods": ["Gain of the scale search", "Share of the weight error that inputs see"],
        "provenance": ["Calibration", "Source", "Versions", "Recipe"],
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
    layers = {n: {"weight_error": f["weight_error"]} for n, f in provenance(2)["layers"].items() if "weight_error" in f}
    report = collect(write_checkpoint(tmp_path / "d", 2, layers=layers, calibration=None))
    assert titles(report, "errors") == ["Relative weight error", "Worst layers"]
    layers["model.layers.0.mlp.up_proj"]["output_error"] = 0.1
    report = collect(write_checkpoint(tmp_path / "e", 2, layers=layers))
    assert titles(report, "errors") == ["Relative output error", "Relative weight error", "Worst layers"]


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
    bits = section(collect(folder), "weights")["items"][0]
    assert bits["values"][LINEARS.index("mlp.up_proj")] == [4, 16]
    assert bits["values"][LINEARS.index("mlp.down_proj")] == [4, 4]


def test_histograms_mark_the_codes(full: Path):
    group = section(collect(full), "weights")["items"][1]
    assert [p["title"] for p in group["pictures"]] == [
        f"{r}, 4-bit g128" for r in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    assert group["pictures"][0]["points"] == list(range(-8, 8))


def test_the_leading_evaluation_is_against_the_parent_in_kernel_numerics(bare: Path):
    save(bare, "a", evaluation(baseline=None, baseline_perplexity=None, kld_mean=None, perplexity=1.0, tokens=10**6))
    save(bare, "b", evaluation(numerics="stock", perplexity=2.0, tokens=10**5))
    save(bare, "c", evaluation(perplexity=3.0, tokens=100))
    save(bare, "d", evaluation(perplexity=4.0, tokens=200))
    report = collect(bare)
    assert headlines(report)["Perplexity"] == 4.0
    assert "200 predicted tokens" in report.basis
    rows = section(report, "quality")["items"][0]["rows"]
    assert [row[4] for row in rows] == [4.0, 3.0, 2.0, 1.0]


def test_an_evaluation_without_parent_asks_for_one(bare: Path):
    nothing = {k: None for k in evaluation() if k.startswith(("kld", "baseline", "top1", "delta"))}
    alone = evaluation(**nothing, worst=[])
    alone["by_position"] |= {"kld": None, "baseline_nll": None}
    save(bare, "a", alone)
    report = collect(bare)
    assert set(headlines(report)) == {"Bits per weight", "Size on disk", "Perplexity"}
    assert "no parent" in report.basis
    note = section(report, "quality")["items"][-1]
    assert note["command"] == f"pq eval {bare} --baseline PARENT"
    assert titles(report, "tokens") == ["note"]
    Page(render(report))


def test_what_is_absent_names_the_command_that_adds_it(bare: Path):
    report = collect(bare)
    commands = {item["command"] for s in as_json(report)["sections"] for item in s["items"] if item["kind"] == "note"}
    assert commands == {
        f"pq eval {bare} --baseline PARENT",
        f"pq eval {bare} --baseline PARENT --tasks TASKS",
        "pq convert --model PARENT --recipe fireq --output NEW_FOLDER",
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
    log.write_text('x INFO summary {"seconds": 1}\nx INFO summary {"seconds": 2.5}\n{"seconds": 9}\n')
    assert headlines(collect(bare))["Conversion"] == 2.5
    log.write_text("x INFO summary {broken\n")
    assert "Conversion" not in headlines(collect(bare))


# Methods draw their own facts


def test_awq_shows_the_gain_of_its_search():
    layers = {f"model.layers.{i}.{e}": {"search_ratio": 0.1 * (i + 1)} for i in range(3) for e in ("attn_norm", "v_o")}
    (picture,) = Awq().pictures(layers)
    assert isinstance(picture, Heatmap)
    assert (picture.rows, picture.columns) == (["attn_norm", "v_o"], ["0", "1", "2"])
    assert picture.values[0] == [0.1, 0.2, pytest.approx(0.3)]
    assert Awq().pictures({"model.layers.0.mlp.up_proj": {"weight_error": 1.0}}) == ()


def test_fireq_shows_trouble_only_where_there_is_any():
    name, other = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    fine = {"damping": 0.1, "dead_inputs": 0, "weight_error": 0.02, "output_error": 0.005}
    (ratio,) = Fireq().pictures({name: fine})
    assert isinstance(ratio, Heatmap)
    assert ratio.values == [[0.25]]
    seen = Fireq().pictures({name: fine, other: fine | {"damping": 1.0, "dead_inputs": 5, "weight_error": 0.0}})
    assert [p.title for p in seen][1:] == ["Damping", "Dead inputs"]
    paper = Fireq(rounding="nearest", scales="tensor").pictures({name: {"tensor_scale": 256.0, "weight_error": 0.1}})
    assert [p.title for p in paper] == ["Scale t against underflow"]
    assert Fireq().pictures({}) == ()


@pytest.mark.parametrize("stage", STAGES, ids=lambda cls: cls.__name__)
def test_pictures_bear_facts_of_any_kind(stage: type[Any]):
    odd = ["x", None, True, [1], {}, math.nan, math.inf, -1.0, 0, 10**400]
    names = ("damping", "dead_inputs", "weight_error", "output_error", "tensor_scale", "search_ratio")
    layers = {f"model.layers.{i}.mlp.up_proj": dict.fromkeys(names, value) for i, value in enumerate(odd)}
    for picture in stage().pictures(layers):
        svg(picture, "a-")
    assert Rtn().pictures(layers) == ()


def test_a_recipe_of_another_version_only_costs_the_methods_pictures(tmp_path: Path):
    recipe = {"name": "new", "resolved": "description: x\nstages:\n- method: teleport\n"}
    report = collect(write_checkpoint(tmp_path / "d", 2, recipe=recipe))
    (note,) = section(report, "methods")["items"]
    assert "teleport" in note["text"]
    assert titles(report, "errors") == ["Relative output error", "Worst layers"]


# Names and pictures


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("model.layers.12.v_o", (12, "v_o")),
        ("model.layers.0.mlp.experts.7.up_proj", (0, "mlp.experts.7.up_proj")),
        ("lm_head", None),
        ("3.mlp", None),
        ("model.layers.3", None),
        ("model.layers.³.x", None),
    ],
)
def test_place_of(name: str, place: tuple[int, str] | None):
    assert place_of(name) == place


def test_block_map_sorts_blocks_and_leaves_gaps():
    drawn = block_map({"m.10.a": 1.0, "m.9.b": 2.0, "head": 9.0}, title="", caption="")
    assert drawn is not None
    assert (drawn.rows, drawn.columns, drawn.values) == (["a", "b"], ["9", "10"], [[None, 1.0], [2.0, None]])
    assert block_map({"head": 9.0}, title="", caption="") is None
    assert facts({"a": {"f": 1}, "b": {"f": True}, "c": {"f": "1"}, "d": {}}, "f") == {"a": 1}


def test_pictures_refuse_data_that_do_not_fit_together():
    with pytest.raises(ValueError, match="rows"):
        Heatmap("", "", ["a"], ["b"], [])
    with pytest.raises(ValueError, match="columns"):
        Heatmap("", "", ["a"], ["b"], [[1, 2]])
    with pytest.raises(ValueError, match="series s"):
        Lines("", "", [1, 2], {"s": [1]})
    with pytest.raises(ValueError, match="edges"):
        Histogram("", "", [0, 1], [1, 2])
    with pytest.raises(ValueError, match="columns"):
        Table("", "", ["a"], [[1, 2]])


numbers = st.one_of(st.none(), st.floats(), st.integers(-(10**20), 10**20))
words = st.text(max_size=12)


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    n, m = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    title, label, flag = draw(words), draw(words), draw(st.booleans())
    row = st.lists(numbers, min_size=m, max_size=m)
    names = draw(st.lists(words, min_size=m, max_size=m))
    kind = draw(st.sampled_from(["heatmap", "lines", "bars", "histogram", "scatter"]))
    if kind == "heatmap":
        rows = draw(st.lists(words, min_size=n, max_size=n))
        return Heatmap(title, label, rows, names, draw(st.lists(row, min_size=n, max_size=n)), label, flag, label)
    series = draw(st.dictionaries(words, row, max_size=3))
    x = sorted(draw(st.lists(st.floats(-1e6, 1e6), min_size=m, max_size=m)))
    if kind == "lines":
        return Lines(title, label, x, series, label, label, flag, draw(st.booleans()))
    if kind == "bars":
        return Bars(title, label, names, series, label, flag)
    if kind == "histogram":
        edges = sorted(draw(st.sets(st.floats(-1e6, 1e6), min_size=m + 2, max_size=m + 2)))
        return Histogram(title, label, edges, [*draw(row), 1], x, label)
    return Scatter(title, label, [(name, at, at) for name, at in zip(names, x, strict=True)], label, label, flag)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pictures())
def test_any_picture_can_be_drawn(picture: Picture):
    drawn = svg(picture, "z-")
    page = Page(drawn)
    assert page.tags[0][0] == "svg"
    assert page.tags[0][1]["role"] == "img"
    assert all(attrs["id"].startswith("z-") for _, attrs in page.tags if attrs.get("id"))
    painted = [attrs.get(key) or "" for _, attrs in page.tags for key in ("fill", "stroke")]
    assert not [colour for colour in painted if colour.startswith("#")], "a stand-in colour is left"
    assert "nan" not in drawn.split("aria-label")[0]
    assert drawn == svg(picture, "z-")


def test_heat_maps_name_every_cell():
    drawn = Page(
        svg(Heatmap("t", "c", ["q<", "k"], ["0", "1"], [[1.0, None], [0.25, math.nan]], "u", False, "block"), "")
    )
    assert "block 0, q<: 1 u" in drawn.text
    assert "block 1, q<: not measured" in drawn.text
    assert "block 0, k: 0.25 u" in drawn.text
    assert len(drawn.all("title")) == 4


def test_the_colours_of_a_heat_map_rise_with_the_values():
    values = [10.0 ** (-k / 3) for k in range(30)]
    drawn = Page(svg(Heatmap("", "", ["r"], [str(k) for k in range(30)], [values], log=True), ""))
    steps = [int(re.findall(r"\d+", str(a["fill"]))[0]) for a in drawn.all("path") if "var(--h" in str(a.get("fill"))]
    assert steps[:30] == sorted(steps[:30], reverse=True)
    assert set(steps[:30]) == set(range(11))


def test_the_front_is_what_nothing_beats():
    points = [("a", 1.0, 3.0), ("b", 2.0, 2.0), ("c", 2.5, 2.5), ("d", 3.0, 1.0)]
    plain = svg(Scatter("", "", points), "")
    drawn = Page(svg(Scatter("", "", points, front=True), ""))
    (front,) = [a for a in drawn.all("path") if a.get("stroke") == "var(--s1)"]
    assert str(front["d"]).count("L") == 4  # three points, two steps
    assert "--s1" not in plain


def test_pictures_of_a_group_share_their_scale():
    low, high = Lines("", "", [0, 1], {"a": [1.0, 2.0]}), Lines("", "", [0, 1], {"a": [5.0, None]})
    found = y_range([low, high])
    assert found is not None
    assert found[0] < 1.0
    assert found[1] > 5.0
    assert y_range([Lines("", "", [0], {"a": [None]})]) is None
    assert svg(low, "", Frame(y_range=found)) != svg(low, "")
    assert shares(Histogram("", "", [0, 1, 2], [1, 3])) == [25.0, 75.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.0, "1"),
        (0.0123456, "0.01235"),
        (0.000123, "1.23e-4"),
        (12345, "12345"),
        (2.5e7, "2.5e7"),
        (-4, "-4"),
    ],
)
def test_shown(value: float, text: str):
    assert shown(value) == text


def test_cells_and_tokens_as_text():
    assert [cell(v) for v in (None, math.nan, "x", 0.123456, 30660)] == ["–", "–", "x", "0.1235", "3.066e+04"]
    assert cell(30660, ",d") == "30,660"
    assert visible("a\nb\t\u202ec\x00") == "a↵b⇥⟨202E⟩c⟨0000⟩"


# The page and its files


def test_equal_files_give_equal_bytes(full: Path, html: str):
    assert render(collect(full)) == html


def test_nothing_on_the_page_comes_from_elsewhere(html: str):
    page = Page(html)
    forbidden = {"script", "img", "link", "iframe", "object", "embed", "base", "form", "image", "foreignobject"}
    assert not forbidden & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        for key, value in attrs.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert str(value).startswith("#")
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    assert "default-src 'none'" in html


def test_ids_are_unique_and_references_meet_them(html: str):
    page = Page(html)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = {str(v)[1:] for _, attrs in page.tags for k, v in attrs.items() if k == "href"}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert wanted <= set(ids)


def test_pictures_have_names_and_figures_have_captions(html: str):
    page = Page(html)
    drawings = page.all("svg")
    assert len(drawings) > 20
    assert all(a["role"] == "img" and str(a["aria-label"]).strip(". ") for a in drawings)
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(drawings)


def test_text_of_files_is_text_on_the_page(tmp_path: Path):
    layers = {f"model.layers.0.{HOSTILE}": {"weight_error": 0.1, "fallback": HOSTILE}}
    hostile = {"name": HOSTILE, "resolved": HOSTILE}
    changes: dict[str, Any] = {"layers": layers, "recipe": hostile, "pq": HOSTILE, "source": {HOSTILE: HOSTILE}}
    folder = write_checkpoint(tmp_path / "<b>&demo", 1, **changes, calibration={HOSTILE: HOSTILE})
    worst = [{key: HOSTILE if isinstance(value, str) else value for key, value in evaluation()["worst"][0].items()}]
    strings = {k: HOSTILE for k, v in evaluation().items() if isinstance(v, str) and k != "kind"}
    save(folder, "a", evaluation(**strings, worst=worst))
    save(folder, "t", task_run() | {"scores": [], "tasks": {HOSTILE: {HOSTILE: {"value": 1.0}}}, "model": HOSTILE})
    data = (
        json.dumps(statistics(1)).replace('"self_attn.q_proj"', json.dumps(HOSTILE)).replace('"q"', json.dumps(HOSTILE))
    )
    (folder / "pq-statistics.json").write_text(data)
    html = render(collect(folder))
    page = Page(html)
    assert not {"script", "img", "b>"} & {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert page.text.count("<img src=x onerror=alert(1)>") > 10
    assert "\x00" not in html
    assert "\u202e" not in "".join(re.findall(r'class="context">.*?</p>', html))


def test_lone_surrogates_and_odd_text_do_not_stop_the_page(bare: Path):
    save(bare, "a", evaluation(data="\ud800 \ufffe", worst=[{"token": "\udfff"}, "no dict", {}]))
    html = render(collect(bare))
    html.encode("utf-8")
    write(bare)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_evaluations_of_any_shape_do_not_stop_the_page(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("odd") / "d"
    write_checkpoint(folder, 1)
    values = st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers(-(10**400), 10**400) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=5,
    )
    for name, good in (("a", rolling()), ("t", task_run())):
        keys = data.draw(st.lists(st.sampled_from(sorted(set(good) - {"kind"})), min_size=1, max_size=6, unique=True))
        save(folder, name, good | {key: data.draw(values) for key in keys})
    odd = statistics(1)
    place = data.draw(st.sampled_from([odd, odd["blocks"][0], odd["blocks"][0]["inputs"]["mlp.down_proj"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(values)
    (folder / "pq-statistics.json").write_text(json.dumps(odd))
    report = collect(folder)
    render(report)
    json.dumps(as_json(report), allow_nan=False)


def test_broken_files_are_named_and_left_out(bare: Path):
    (bare / "pq-statistics.json").write_text('{"blocks": [')
    save(bare, "fine", evaluation())
    save(bare, "other", {"kind": "poem"})
    (bare.with_name("demo.eval") / "cut.json").write_text('{"kind": "perp')
    (bare / "model.safetensors").write_bytes(b"nothing")
    report = collect(bare)
    notes = "\n".join(report.warnings)
    for words_ in ("pq-statistics.json", "cut.json", "other.json", "checkpoint itself"):
        assert words_ in notes
    assert headlines(report)["Perplexity"] == 88.17
    Page(render(report))


def test_large_models_stay_small(tmp_path: Path):
    folder = add_everything(write_checkpoint(tmp_path / "large", 80), 80)
    html = render(collect(folder))
    assert len(html.encode()) < 3_000_000
    page = Page(html)
    assert "block 79, mlp.down_proj" in page.text
    for attrs in page.all("svg"):
        assert float(str(attrs["width"])) < 1000


def test_write_puts_both_files_beside_the_checkpoint(full: Path, tmp_path: Path):
    before = sorted(p.name for p in full.iterdir())
    page = write(full)
    assert page == full.with_name("demo.report.html")
    data = json.loads(full.with_name("demo.report.json").read_text())
    assert data == json.loads(json.dumps(as_json(collect(full))))
    assert sorted(p.name for p in full.iterdir()) == before
    assert not list(full.parent.glob(".*"))
    assert page.stat().st_mode & 0o777 == 0o666 & ~_umask()
    other = write(full, tmp_path / "sub" / "x.html")
    assert other.read_text() == page.read_text()
    assert (tmp_path / "sub" / "x.json").exists()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_relative_folder_is_named_after_itself(full: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(full)
    assert collect(Path(".")).name == "demo"
    assert write(Path(".")) == full.with_name("demo.report.html")


def test_a_failing_write_leaves_the_old_page(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = write(full, tmp_path / "x.html")
    old = page.read_text()

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="no space left"):
        write(full, page)
    assert page.read_text() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.html", "x.json"]


def test_output_is_a_page_outside_the_checkpoint(full: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"must end in \.html"):
        write(full, tmp_path / "x.json")
    with pytest.raises(UsageError, match="inside the checkpoint"):
        write(full, full / "x.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write(full, tmp_path / "file" / "x.html")


def test_colours_are_readable_in_both_modes():
    css = (Path(__file__).parents[1] / "quantize/report/report.css").read_text()
    modes = [dict(re.findall(r"--(\w+): (#[0-9a-f]+)", part)) for part in css.split("@media (prefers")[:2]]
    assert len(modes) == 2
    for mode in modes:
        pairs = [(word, ground) for word in ("ink", "muted", "accent") for ground in ("paper", "panel")]
        pairs += [("warn", "warn-panel"), ("mark-ink", "mark"), ("ink", "missing")]
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", css.split("@media (prefers")[modes.index(mode)]))
        pairs += [(f"t{i}", f"h{i}") for i in range(11)]
        for word, ground in pairs:
            assert contrast(colours[word], colours[ground]) >= 4.5, (word, ground)
        for i in range(6):  # lines need less than words
            assert contrast(colours[f"s{i}"], colours["paper"]) >= 3.0, i


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(c * w for c, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# Folders that pq did not write, and the command


def test_a_folder_that_pq_did_not_write_is_one_clear_line(tmp_path: Path):
    with pytest.raises(ModelError, match=r"has no pq\.json, so pq did not write it; give the output folder"):
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
            i for s in collect(full).sections if s.id in ("quality", "tokens") for i in s.items if isinstance(i, kind)
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
