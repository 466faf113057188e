"""The page: complete, self-contained, escaped, readable, and written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_samples import (
    HOSTILE,
    Page,
    add_everything,
    evaluation,
    headlines,
    rolling,
    save,
    statistics,
    task_run,
    write_checkpoint,
)

from quantize.errors import OutputError, UsageError
from quantize.report import as_json, collect, render, write


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_everything(write_checkpoint(tmp_path_factory.mktemp("full") / "demo", 6), 6)


@pytest.fixture(scope="module")
def html(full: Path) -> str:
    return render(collect(full))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "demo", 2)


def test_equal_files_give_equal_bytes(full: Path, html: str):
    assert render(collect(full)) == html


def test_nothing_on_the_page_comes_from_elsewhere(html: str):
    page = Page(html)
    forbidden = {
        "script",
        "img",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "image",
        "foreignobject",
    }
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
    changes: dict[str, Any] = {
        "layers": layers,
        "recipe": hostile,
        "pq": HOSTILE,
        "source": {HOSTILE: HOSTILE},
    }
    folder = write_checkpoint(tmp_path / "<b>&demo", 1, **changes, calibration={HOSTILE: HOSTILE})
    worst = [
        {
            key: HOSTILE if isinstance(value, str) else value
            for key, value in evaluation()["worst"][0].items()
        }
    ]
    strings = {k: HOSTILE for k, v in evaluation().items() if isinstance(v, str) and k != "kind"}
    save(folder, "a", evaluation(**strings, worst=worst))
    save(
        folder,
        "t",
        task_run()
        | {"scores": [], "tasks": {HOSTILE: {HOSTILE: {"value": 1.0}}}, "model": HOSTILE},
    )
    data = (
        json.dumps(statistics(1))
        .replace('"self_attn.q_proj"', json.dumps(HOSTILE))
        .replace('"q"', json.dumps(HOSTILE))
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
def test_evaluations_of_any_shape_do_not_stop_the_page(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = tmp_path_factory.mktemp("odd") / "d"
    write_checkpoint(folder, 1)
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.floats()
        | st.integers(-(10**400), 10**400)
        | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=5,
    )
    for name, good in (("a", rolling()), ("t", task_run())):
        keys = data.draw(
            st.lists(
                st.sampled_from(sorted(set(good) - {"kind"})), min_size=1, max_size=6, unique=True
            )
        )
        save(folder, name, good | {key: data.draw(values) for key in keys})
    odd = statistics(1)
    place = data.draw(
        st.sampled_from([odd, odd["blocks"][0], odd["blocks"][0]["inputs"]["mlp.down_proj"]])
    )
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


def test_a_failing_write_leaves_the_old_page(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
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
    css = (Path(__file__).parents[2] / "quantize/report/report.css").read_text()
    modes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]+)", part))
        for part in css.split("@media (prefers")[:2]
    ]
    assert len(modes) == 2
    for mode in modes:
        pairs = [
            (word, ground) for word in ("ink", "muted", "accent") for ground in ("paper", "panel")
        ]
        pairs += [("warn", "warn-panel"), ("mark-ink", "mark"), ("ink", "missing")]
        colours = dict(
            re.findall(r"--([\w-]+): (#[0-9a-f]+)", css.split("@media (prefers")[modes.index(mode)])
        )
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
