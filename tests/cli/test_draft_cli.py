"""`pq draft` as people call it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantize.cli import app

sys.path.insert(0, str(Path(__file__).parents[1] / "draft"))
from drafts import REFERENCE, docstrings, rounded


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rounded(tmp_path_factory.mktemp("cli") / "w4", 4)


def call(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["draft", *map(str, words)], env={"COLUMNS": "80"})
    if code == 0 and done.exception:
        raise done.exception
    return done.stdout


def test_tables_page_config_and_json(draft: Path, tmp_path: Path):
    text = docstrings(tmp_path / "text.txt")
    page, config, saved = (tmp_path / n for n in ("p.html", "c.json", "r.json"))
    small = ["--target", REFERENCE, "--prompts", 8, "--prompt-tokens", 12]
    small += ["--dataset", text]
    out = call(
        draft,
        *small,
        *("--tokens", 40, "--cost", 0.3, "--policies", "--save-rollout", saved),
        *("-o", page, "--emit", config),
    )
    assert max(map(len, out.splitlines())) <= 80
    assert "n-gram lookup" in out
    assert "dsde-published-code" in out
    assert "offered" in out
    written = json.loads(config.read_text())
    assert written["method"] == "draft_model"
    assert written["draft_sample_method"] == "probabilistic"
    html = page.read_text()
    parts = ("Tokens per step", "How far to look ahead", "Bursts of divergence", "vllm serve")
    for part in (*parts, "set --max-model-len"):
        assert part in html
    shown = call(draft, *small, "--rollout", saved, "--gpu", "l4", "--json")
    data = json.loads(shown[shown.index("{") :])
    first = data["drafts"][0]
    assert first["memory"]["parent_kv_token"] == 3 * 2 * 2 * 64 * 2
    greedy = first["temperatures"][0]
    assert [pay["batch"] for pay in greedy["pays"]] == [1, 8, 32, 128]
    assert 0.5 < greedy["sampling"]["alpha"]["value"] <= 1
    assert data["gpu"]["name"] == "l4"
    served = [d for d in data["drafts"] if d["command"]]
    assert all("--max-model-len" in d["notes"][0] for d in served)
    dear = ["draft", draft, *small, "--rollout", saved, "--cost", 9, "--emit", tmp_path / "no.json"]
    done = CliRunner().invoke(app, [*map(str, dear)], env={"COLUMNS": "80"})
    assert "is not faster than the parent alone" in str(done.exception)
    assert "tokens per step" in done.stdout  # the figures are there all the same
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([REFERENCE], "name the parent with --target"),
        (["--target", REFERENCE], "give a draft model, --recipe or --sibling"),
        ([REFERENCE, "-t", REFERENCE, "--gpu", "h99"], "GPU 'h99' is not in the table"),
        ([REFERENCE, "-t", REFERENCE, "--save-policy", "p.json"], "--save-policy needs --policies"),
    ],
)
def test_mistakes_are_told_in_a_line(words: list[object], message: str):
    done = CliRunner().invoke(app, ["draft", *map(str, words)])
    assert message in str(done.exception)
