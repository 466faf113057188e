"""Sections on bytes, divergences, conversions beside, engines, commands; and axes that can be read."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from report_samples import evaluation, save, section, write_checkpoint

from quantize.evaluation.records import Records
from quantize.pictures import Bars, Heatmap, Histogram, Lines
from quantize.report import collect, render
from quantize.report.draw import Frame, draw
from quantize.report.model import Note, plainly
from quantize.report.svg import svg


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "demo", 2)


def item(folder: Path, identity: str, title: str) -> dict[str, Any]:
    return next(i for i in section(collect(folder), identity)["items"] if i.get("title") == title)


def test_bytes_by_part_add_up_to_the_file(bare: Path):
    table = item(bare, "weights", "Bytes by part")
    header = 8 + int.from_bytes((bare / "model.safetensors").read_bytes()[:8], "little")
    tensors = (bare / "model.safetensors").stat().st_size - header
    assert sum(row[1] for row in table["rows"]) * 1e6 == pytest.approx(tensors)
    assert sum(row[2] for row in table["rows"]) == pytest.approx(100)
    parts = {row[0]: row for row in table["rows"]}
    assert parts["embedding"][1:] == [
        32 * 128 * 2 / 1e6,
        parts["embedding"][2],
        None,
        None,
        32 * 128 * 2 / 1e6,
    ]
    # of two blocks: codes [2, 16] int32, scales [2, 1] bfloat16 and the shape [2] int64
    assert parts["mlp.down_proj"][3:] == [2 * 128 / 1e6, 2 * (4 + 16) / 1e6, None]
    bars = item(bare, "weights", "Where the bytes are")
    assert sum(map(sum, bars["series"].values())) * 1e6 == pytest.approx(tensors)


def test_the_histogram_counts_every_token():
    kld = torch.cat([torch.logspace(-8, 3, 500), torch.zeros(7)])
    found = Records({"kld": [kld]}).histogram("kld")
    edges, counts = found["edges"], found["counts"]
    assert len(edges) == len(counts) + 1 == 33
    assert (edges[0], edges[-1]) == pytest.approx((1e-6, 100))
    inner = [
        sum(bool(low <= v < high) for v in kld.double().tolist())
        for low, high in itertools.pairwise(edges)
    ]
    below, above = int((kld.double() < edges[0]).sum()), int((kld.double() >= edges[-1]).sum())
    assert counts == [inner[0] + below, *inner[1:-1], inner[-1] + above]
    assert sum(counts) == 507


def test_the_spread_of_divergences_is_drawn_where_tokens_are(bare: Path):
    save(bare, "a", evaluation())
    drawn = item(bare, "quality", "KL divergence of single tokens")
    assert drawn["log_x"] is True
    used = [count for count in evaluation()["kld_histogram"]["counts"] if count]
    assert drawn["counts"] == used
    assert len(drawn["edges"]) == len(used) + 1
    assert drawn["counts"][0] > 0 < drawn["counts"][-1]
    assert drawn["points"] == [0.0029, 0.0045, 0.0281]
    for broken in (
        None,
        {},
        {"edges": [1, 2], "counts": [1, 2]},
        {"edges": [2, 1], "counts": [3]},
        {"edges": [-1, 1], "counts": [3]},
    ):
        save(bare, "a", evaluation(kld_histogram=broken))
        titles = [i.get("title") for i in section(collect(bare), "quality")["items"]]
        assert "KL divergence of single tokens" not in titles, broken


def test_conversions_that_lie_beside_are_compared_where_they_were_measured_alike(
    bare: Path, tmp_path: Path
):
    save(bare, "a", evaluation(kld_mean=0.02))
    for name, changes in {
        "better": {"kld_mean": 0.01, "bits_per_weight": 4.0},
        "smaller": {"kld_mean": 0.2, "bits_per_weight": 3.1},
        "elsewhere": {"data_sha256": "00" * 32},
        "otherwise": {"numerics": "stock"},
    }.items():
        folder = shutil.copytree(bare, tmp_path / name)
        save(folder, "e", evaluation(**changes))
    shutil.copytree(bare, tmp_path / "unmeasured")
    (tmp_path / "no-checkpoint").mkdir()
    picture, table, note = section(collect(bare), "tradeoff")["items"]
    assert {p[0]: tuple(p[1:]) for p in picture["points"]} == {
        "demo (this)": (4.125, 0.02),
        "better": (4.0, 0.01),
        "smaller": (3.1, 0.2),
    }
    assert [(row[0], row[-1]) for row in table["rows"]] == [
        ("better", "yes"),
        ("demo (this)", ""),
        ("smaller", "yes"),
    ]
    assert note["text"].endswith("so not compared: elsewhere, otherwise.")


def test_engines_and_next_commands_name_real_things(bare: Path):
    table = item(bare, "use", "Loads in")
    assert any(row[0].startswith("vLLM") and row[2] == "yes" for row in table["rows"])
    assert any(row[0].startswith("llama.cpp") and row[2] == "no" for row in table["rows"])
    following = item(bare, "use", "What next")["text"]
    for command in ("pq eval", "pq verify", "pq serve-check", "pq gate init"):
        assert f"{command} {bare}" in following
    page = render(collect(bare))
    assert not re.search(r"\b(PARENT|NEW_FOLDER|TASKS|OTHER)\b", page)


def test_the_parent_is_named_as_it_was_given(bare: Path, tmp_path: Path):
    log = bare.with_name("demo.log")
    for argv, expected in (
        (["convert", "-m", "my models/llama", "-r", "rtn"], f"'{tmp_path}/my models/llama'"),
        (["convert", "--model=my models/llama"], f"'{tmp_path}/my models/llama'"),
        (["convert", "--model", "org/name"], "org/name"),
        (["convert", "--model"], "path/to/parent"),
    ):
        (tmp_path / "my models" / "llama").mkdir(parents=True, exist_ok=True)
        started = json.dumps({"argv": argv, "cwd": str(tmp_path)})
        log.write_text(f"2026-01-01 00:00:00 INFO started {started}\n")
        assert f"--baseline {expected}" in item(bare, "use", "What next")["text"], argv
    made = item(bare, "provenance", "Command")
    assert made["text"] == "pq convert --model"
    log.unlink()
    made = item(bare, "provenance", "Command")
    assert "pq.json" in made["caption"]
    assert made["text"].startswith("pq convert --model path/to/parent --recipe fireq --output")
    save(bare, "a", evaluation())
    assert "--baseline path/to/yardstick" in item(bare, "use", "What next")["text"]
    origin = {"id": "org/llama", "commit": "ab" * 20}
    data = json.loads((bare / "pq.json").read_text()) | {"origin": origin}
    (bare / "pq.json").write_text(json.dumps(data))
    assert f"--baseline org/llama@{'ab' * 20}" in item(bare, "use", "What next")["text"]


def test_a_map_of_one_value_is_a_sentence():
    def map_of(values: list[list[float | None]]) -> Heatmap:
        columns = [str(i) for i in range(len(values[0]))]
        return Heatmap("Bits", "Why.", ["q", "k"], columns, values, "bits", False, "block")

    assert plainly(map_of([[4, 4], [4, 4]])) == Note("Bits: 4 in all 2 rows of 2 blocks. Why.")
    for others in ([[4, 4], [4, 8]], [[4, None], [4, 4]], [[math.nan] * 2] * 2):
        drawn = map_of(others)
        assert plainly(drawn) is drawn


# Axes


def figure_of(picture: Any) -> Any:
    figure = draw(picture, Frame())
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("low", "high"),
    [(1.0, 1.0), (0.9, 1.1), (2.0, 9.0), (1e-7, 3e-7), (1.2e-4, 0.9), (3, 4e5), (98765.0, 98766.5)],
)
def test_axes_have_three_ticks_or_more_and_room_for_them(low: float, high: float, log: bool):
    lines = Lines("t", "", [0, 1, 2], {"a": [low, high, low]}, "block", "max / median", log_y=log)
    figure = figure_of(lines)
    (ax,) = figure.axes
    bottom, top = ax.get_ylim()
    inside = [t for t in ax.get_yticks() if bottom <= t <= top]
    assert 3 <= len(inside) <= 9
    renderer = figure.canvas.get_renderer()
    assert ax.yaxis.label.get_window_extent(renderer).x0 >= 0
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert len(set(names)) == len(names) or low == high or high - low < 2


def test_bars_across_show_long_names_whole():
    names = ["self_attn.q_proj", "mlp.experts.*.down_proj", "x" * 60]
    bars = Bars(
        "t",
        "",
        names,
        {"a": [3.0, 2.0, None], "b": [1.0, 1.0, 0.5]},
        "MB",
        stacked=True,
        across=True,
    )
    figure = figure_of(bars)
    (ax,) = figure.axes
    renderer = figure.canvas.get_renderer()
    assert min(t.get_window_extent(renderer).x0 for t in ax.get_yticklabels()) >= 0
    first, *_ = ax.get_yticklabels()
    last = ax.get_yticklabels()[-1]
    assert first.get_window_extent(renderer).y0 > last.get_window_extent(renderer).y0  # downwards
    assert ax.get_xlabel() == "MB"
    assert "self_attn.q_proj" in svg(bars, "p-")


def test_a_logarithmic_histogram_spans_its_edges():
    edges = [10 ** (k / 4) for k in range(-16, 1)]
    figure = figure_of(Histogram("t", "", edges, [1] * 16, [0.01], "nats", "tokens", True))
    (ax,) = figure.axes
    assert ax.get_xscale() == "log"
    assert ax.get_xlim() == pytest.approx((edges[0], edges[-1]))
    assert len([t for t in ax.get_xticks() if edges[0] <= t <= edges[-1]]) >= 3
