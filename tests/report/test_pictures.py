"""Pictures: what methods draw of their facts, and that any data can be drawn."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_samples import (
    Page,
)

from quantize.methods import STAGES
from quantize.methods.awq import Awq
from quantize.methods.fireq.stage import Fireq
from quantize.methods.rtn import Rtn
from quantize.pictures import (
    Bars,
    Heatmap,
    Histogram,
    Lines,
    Picture,
    Scatter,
    Table,
    block_map,
    facts,
    place_of,
)
from quantize.report.draw import Frame, format_number, shares, y_range
from quantize.report.html import cell, visible
from quantize.report.svg import svg


def test_awq_shows_the_gain_of_its_search():
    layers = {
        f"model.layers.{i}.{e}": {"search_ratio": 0.1 * (i + 1)}
        for i in range(3)
        for e in ("attn_norm", "v_o")
    }
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
    seen = Fireq().pictures(
        {name: fine, other: fine | {"damping": 1.0, "dead_inputs": 5, "weight_error": 0.0}}
    )
    assert [p.title for p in seen][1:] == ["Damping", "Dead inputs"]
    paper = Fireq(rounding="nearest", scales="tensor").pictures(
        {name: {"tensor_scale": 256.0, "weight_error": 0.1}}
    )
    assert [p.title for p in paper] == ["Scale t against underflow"]
    assert Fireq().pictures({}) == ()


@pytest.mark.parametrize("stage", STAGES, ids=lambda cls: cls.__name__)
def test_pictures_bear_facts_of_any_kind(stage: type[Any]):
    odd = ["x", None, True, [1], {}, math.nan, math.inf, -1.0, 0, 10**400]
    names = (
        "damping",
        "dead_inputs",
        "weight_error",
        "output_error",
        "tensor_scale",
        "search_ratio",
    )
    layers = {
        f"model.layers.{i}.mlp.up_proj": dict.fromkeys(names, value) for i, value in enumerate(odd)
    }
    for picture in stage().pictures(layers):
        svg(picture, "a-")
    assert Rtn().pictures(layers) == ()


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


def test_names_that_differ_by_a_number_share_a_row():
    values = {
        "m.0.a": 1.0,
        "m.0.e.0.up": 2.0,
        "m.0.e.1.up": None,
        "m.0.e.10.up": 5.0,
        "m.1.e.0.up": None,
    }
    drawn = block_map(values, title="", caption="c.", unit="")
    assert drawn is not None
    assert (drawn.rows, drawn.values) == (["a", "e.*.up"], [[1.0, None], [3.5, None]])
    assert drawn.caption.startswith("c. ")
    assert "mean" in drawn.caption
    plain = block_map({"m.0.a": 1.0}, title="", caption="c.")
    assert plain is not None
    assert plain.caption == "c."


def test_block_map_sorts_blocks_and_leaves_gaps():
    drawn = block_map({"m.10.a": 1.0, "m.9.b": 2.0, "head": 9.0}, title="", caption="")
    assert drawn is not None
    assert (drawn.rows, drawn.columns, drawn.values) == (
        ["a", "b"],
        ["9", "10"],
        [[None, 1.0], [2.0, None]],
    )
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
        return Heatmap(
            title,
            label,
            rows,
            names,
            draw(st.lists(row, min_size=n, max_size=n)),
            label,
            flag,
            label,
        )
    series = draw(st.dictionaries(words, row, max_size=3))
    x = sorted(draw(st.lists(st.floats(-1e6, 1e6), min_size=m, max_size=m)))
    if kind == "lines":
        return Lines(title, label, x, series, label, label, flag, draw(st.booleans()))
    if kind == "bars":
        return Bars(title, label, names, series, label, flag)
    if kind == "histogram":
        edges = sorted(draw(st.sets(st.floats(-1e6, 1e6), min_size=m + 2, max_size=m + 2)))
        return Histogram(title, label, edges, [*draw(row), 1], x, label)
    return Scatter(
        title,
        label,
        [(name, at, at) for name, at in zip(names, x, strict=True)],
        label,
        label,
        flag,
        draw(st.booleans()),
    )


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
        svg(
            Heatmap(
                "t",
                "c",
                ["q<", "k"],
                ["0", "1"],
                [[1.0, None], [0.25, math.nan]],
                "u",
                False,
                "block",
            ),
            "",
        )
    )
    assert "block 0, q<: 1 u" in drawn.text
    assert "block 1, q<: not measured" in drawn.text
    assert "block 0, k: 0.25 u" in drawn.text
    assert len(drawn.all("title")) == 4


def test_the_colours_of_a_heat_map_rise_with_the_values():
    values = [10.0 ** (-k / 3) for k in range(30)]
    drawn = Page(svg(Heatmap("", "", ["r"], [str(k) for k in range(30)], [values], log=True), ""))
    steps = [
        int(re.findall(r"\d+", str(a["fill"]))[0])
        for a in drawn.all("path")
        if "var(--h" in str(a.get("fill"))
    ]
    assert steps[:30] == sorted(steps[:30], reverse=True)
    assert set(steps[:30]) == set(range(11))


def test_the_front_is_what_nothing_beats():
    points = [("a", 1.0, 3.0), ("b", 2.0, 2.0), ("c", 2.5, 2.5), ("d", 3.0, 1.0)]
    plain = svg(Scatter("", "", points), "")
    drawn = Page(svg(Scatter("", "", points, front=True), ""))
    (front,) = [a for a in drawn.all("path") if a.get("stroke") == "var(--s1)"]
    assert str(front["d"]).count("L") == 2  # three points, through nothing else
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
    assert format_number(value) == text


def test_cells_and_tokens_as_text():
    assert [cell(v) for v in (None, math.nan, "x", 0.123456, 30660)] == [
        "–",
        "–",
        "x",
        "0.1235",
        "3.066e+04",
    ]
    assert cell(30660, ",d") == "30,660"
    assert visible("a\nb\t\u202ec\x00") == "a↵b⇥⟨202E⟩c⟨0000⟩"
