"""`pq models`: the table, one type in words, and that the packaged table is that of the sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models.table import FAMILIES, short, table, verdict
from typer.testing import CliRunner

from quantize.cli import app
from quantize.cli.models import KNOWN, known, summary, words
from quantize.errors import UsageError

RESULTS = Path(__file__).resolve().parents[2] / "eval" / "results" / "models.json"


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["models", *args], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_packaged_table_is_made_from_the_results() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = table(results["versions"] | {"rows": results["rows"]})
    assert {**found, "versions": known()["versions"]} == known()
    assert len(FAMILIES) == 30


def test_the_table_lists_every_type_and_the_counts() -> None:
    out = run()
    for name in known()["types"]:
        assert name in out
    assert summary(known()) in out


def test_json_is_the_packaged_file() -> None:
    assert json.loads(run("--json")) == json.loads(KNOWN.read_text(encoding="utf-8"))
    assert list(json.loads(run("llama", "--json"))) == ["llama"]


def test_a_type_in_words() -> None:
    out = run("llama")
    assert out.startswith("llama (LlamaForCausalLM, dense): works\n")
    assert "stock transformers: loads the output" in out
    assert "values → the output projection" in out
    refused = run("zamba")
    assert "zamba (ZambaForCausalLM): refused" in refused
    assert "share shared_transf.self_attn.q_proj" in " ".join(refused.split())


def test_a_type_that_nobody_knows() -> None:
    with pytest.raises(UsageError, match="nosuch: not in the table"):
        CliRunner().invoke(app, ["models", "nosuch"], catch_exceptions=False)


def test_what_a_row_becomes() -> None:
    held, wrong = {"ok": True, "status": "holds"}, {"ok": False, "status": "wrong"}
    refused = {"ok": True, "status": "refused", "why": "x: no", "error": "ModelError"}
    crash = {"ok": False, "why": "KeyError: 1", "where": "a.py:1"}
    assert verdict({"stream": "holds", "rtn8": "holds"}) == "yes"
    assert verdict({"stream": "holds", "rtn8": "holds", "rotate": "refused"}) == "in part"
    assert verdict({"stream": "holds", "rtn8": "refused"}) == "no"
    assert verdict({"stream": "refused"}) == "no"
    assert verdict({"stream": "holds", "rtn8": "holds", "gptq4": "wrong"}) == "wrong"
    checks = {"stream": held, "rtn8": held | {"kld": 1e-5}, "rotate": refused, "smooth": wrong}
    row = short({"class": "C", "checks": checks | {"gptq4": crash}})
    assert row["works"] == "wrong"
    assert row["status"]["gptq4"] == "fails"
    assert row["refused"] == {"x: no": ["rotate"], "KeyError: 1": ["gptq4"]}
    said = "\n".join(words("c", row | {"stock": "it cannot"}))
    assert "refused (rotate): x: no" in said
    assert "stock transformers: does not: it cannot" in said
