from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from gates import result_of
from hypothesis import given
from hypothesis import strategies as st

from quantize.cli.gate import print_verdicts
from quantize.errors import QualityError, RecipeError, UsageError
from quantize.files import strict_yaml
from quantize.gate.file import load_gate
from quantize.gate.update import update_baselines

FILE = """# first line

model: "MODEL"   # where it is
recipes:
  # the best one
  fireq:
    protocol: strided-256
    kld_mean:   { tolerance: 30%, value: 0.0249 }   # measured: 0.0249
    perplexity: {recovery: 0.95, value: 10.50, tolerance: 0.1}
    "bits_per_weight":
      "value" : 4.25
      tolerance: 0

    set: []
  rtn:
    kld_mean: {value: 0.0249, tolerance: 100%}
    protocol: "strided-256"
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_an_update_changes_only_the_numbers(tmp_path: Path, newline: str, bom: str):
    path = tmp_path / "gate.yaml"
    before = (bom + FILE.replace("\n", newline)).encode()
    path.write_bytes(before)
    changes = update_baselines(path, result_of(path, kld_mean=0.0230912), " a better\n solver ")
    assert changes == [
        "fireq.kld_mean 0.0249 -> 0.0231",
        "fireq.bits_per_weight 4.25 -> 4.125",
        "rtn.kld_mean 0.0249 -> 0.0231",
    ]
    after = path.read_bytes()
    expected = before.replace(b"value: 0.0249 }", b"value: 0.0231 }").replace(
        b"{value: 0.0249,", b"{value: 0.0231,"
    )
    expected = expected.replace(b'"value" : 4.25', b'"value" : 4.125')
    assert after.startswith(expected)
    assert (b"\r\n" in after) == (newline == "\r\n")
    assert after.replace(newline.encode(), b"").count(b"\n") == 0
    history = strict_yaml.load(after, "x").data["history"]
    assert [(item["reason"], item["changes"]) for item in history] == [("a better solver", changes)]
    assert {"pq", "python", "torch", "transformers"} == set(history[0]["versions"])
    assert [p.name for p in tmp_path.iterdir()] == ["gate.yaml"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (  # a block, its first key under a comment
            "  fireq:\n    # why\n    kld_mean: {value: 0.02, tolerance: 0}\n    set: []\n",
            "  fireq:\n    # why\n    protocol: strided-256-bos\n"
            "    kld_mean: {value: 0.02, tolerance: 0}\n    set: []\n",
        ),
        (  # on one line
            "  fireq: { kld_mean: {value: 0.02, tolerance: 0} }\n",
            "  fireq: { protocol: strided-256-bos, kld_mean: {value: 0.02, tolerance: 0} }\n",
        ),
        (  # another name in its place
            "  fireq:\n    kld_mean: {value: 0.02, tolerance: 0}\n    protocol: 'strided-256' # p\n",
            "  fireq:\n    kld_mean: {value: 0.02, tolerance: 0}\n    protocol: strided-256-bos # p\n",
        ),
        (  # demands, and what no text decides
            "  fireq: {perplexity: {recovery: 0.9}, bits_per_weight: {value: 4.125, tolerance: 0}}\n",
            None,
        ),
    ],
)
def test_an_update_names_the_protocol(tmp_path: Path, before: str, after: str | None, newline: str):
    path = tmp_path / "gate.yaml"
    path.write_bytes(("recipes:\n" + before).replace("\n", newline).encode())
    changes = update_baselines(path, result_of(path, "strided-256-bos", kld_mean=0.02), "why")
    text = path.read_bytes().decode()
    assert text.startswith(("recipes:\n" + (after or before)).replace("\n", newline))
    old = "strided-256 -> " if "'strided-256'" in before else ""
    assert changes == ([f"fireq.protocol {old}strided-256-bos"] if after else [])
    assert update_baselines(path, result_of(path, "strided-256-bos", kld_mean=0.02), "again") == []


def test_figures_that_the_run_lacks_get_no_new_name(tmp_path: Path):
    path = tmp_path / "gate.yaml"
    path.write_text("recipes: {fireq: {kld_mean: {value: 0.02, tolerance: 0}}}\n")
    result = result_of(path, "strided-256-bos")
    path.write_text(
        "recipes: {fireq: {kld_mean: {value: 0.02, tolerance: 0}, kld_p99: {value: 1, tolerance: 0}}}\n"
    )
    with pytest.raises(UsageError, match=r"fireq\.kld_p99 has changed since the run"):
        update_baselines(path, result, "why")


def test_history_grows_and_nothing_changed_changes_nothing(tmp_path: Path):
    path = tmp_path / "gate.yaml"
    path.write_text(FILE)
    update_baselines(path, result_of(path, kld_mean=0.03), "one: 'it' # is")
    first = path.read_bytes()
    for same in (0.03, 0.03 * 1.002):  # a hundredth of the tolerance is no change
        assert update_baselines(path, result_of(path, kld_mean=same), "two") == []
    assert path.read_bytes() == first
    update_baselines(path, result_of(path, kld_mean=0.02), "three")
    head, history_key, rest = path.read_text().partition("history:\n")
    path.write_text(
        head + history_key + "".join("   " + line for line in rest.splitlines(keepends=True))
    )
    history = load_gate(path).document.data["history"]
    assert [item["reason"] for item in history] == ["one: 'it' # is", "three"]
    update_baselines(path, result_of(path, kld_mean=0.04), "four")
    assert [item["reason"] for item in load_gate(path).document.data["history"]][2:] == ["four"]


@given(
    value=st.floats(1e-9, 1e9),
    tolerance=st.one_of(
        st.just("0"), st.floats(0, 1).map(repr), st.integers(0, 99).map("{}%".format)
    ),
)
def test_after_an_update_the_same_figures_pass(
    tmp_path_factory: pytest.TempPathFactory, value: float, tolerance: str
):
    path = tmp_path_factory.mktemp("gate") / "gate.yaml"
    path.write_text(f"recipes: {{rtn: {{kld_mean: {{value: 77, tolerance: {tolerance}}}}}}}\n")
    update_baselines(path, result_of(path, kld_mean=value), "why")
    assert [v.status for v in result_of(path, kld_mean=value).verdicts] == ["pass"]


@pytest.mark.parametrize("reason", ["", " \n\t"])
def test_an_update_needs_a_reason(tmp_path: Path, reason: str):
    path = tmp_path / "gate.yaml"
    path.write_text(FILE)
    with pytest.raises(UsageError, match="need a reason"):
        update_baselines(path, result_of(path), reason)
    assert path.read_text() == FILE


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_an_update_refuses_what_was_not_measured(tmp_path: Path, value: float | None):
    path = tmp_path / "gate.yaml"
    path.write_text(FILE)
    with pytest.raises(QualityError, match=r"fireq\.kld_mean .*lacks a figure"):
        update_baselines(path, result_of(path, kld_mean=value), "why")
    assert path.read_text() == FILE


def test_an_update_refuses_a_file_that_changed_meanwhile(tmp_path: Path):
    path = tmp_path / "gate.yaml"
    path.write_text(FILE)
    result = result_of(path, kld_mean=0.1)
    for changed in (FILE.replace("0.0249 }", "0.026 }"), FILE.replace("kld_mean", "kld_p99")):
        path.write_text(changed)
        with pytest.raises(UsageError, match="has changed since the run"):
            update_baselines(path, result, "why")
        assert path.read_text() == changed


@pytest.mark.parametrize(
    "text",
    [
        "history: []\n" + FILE,
        FILE + "history: []\n",
        "{recipes: {rtn: {kld_mean: {value: 77, tolerance: 0}}}}\n",
        FILE + "...\n",
    ],
)
def test_an_update_refuses_what_it_cannot_edit(tmp_path: Path, text: str):
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"gate\.yaml:\d+: history: cannot be edited; write"):
        update_baselines(path, result_of(path, kld_mean=0.5), "why")
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["gate.yaml"]


def test_an_update_finds_a_number_on_a_line_of_its_own(tmp_path: Path):
    path = tmp_path / "gate.yaml"
    path.write_text(FILE.replace('"value" : 4.25', '"value" : # é 𝄞\n       4.25  # four'))
    update_baselines(path, result_of(path, kld_mean=0.0249), "why")
    assert '"value" : # é 𝄞\n       4.125  # four\n' in path.read_text()


def test_an_update_keeps_mode_and_links(tmp_path: Path):
    path = tmp_path / "gate.yaml"
    path.write_text(FILE)
    path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    update_baselines(link, result_of(link, kld_mean=0.5), "why")
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert "value: 0.5 }" in path.read_text()


# What is printed


def test_the_table_shows_every_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "gate.yaml"
    path.write_text(FILE)
    result = result_of(path, kld_mean=0.01, perplexity=12.0)
    print_verdicts(result, "pq gate run x.yaml --update-baselines")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["fireq", "kld_mean", "0.01", "-", "0.0249", "±", "30%", "better"] in [
        row[:8] for row in rows
    ]
    assert "recovery 0.8333 must be >= 0.95" in out
    assert "2 of 5 checks failed" in out
    assert (
        "2 better than their baseline (fireq.kld_mean, fireq.bits_per_weight): keep them with "
        "pq gate run x.yaml --update-baselines" in out
    )
    print_verdicts(dataclasses.replace(result, verdicts=()), "")
