"""`pq eval` and `pq compare` as a user types them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest

from quantize.evaluation import evaluate

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def packed(converted: Maker, tmp_path: Path) -> Path:
    """A conversion whose neighbours belong to this test."""
    return shutil.copytree(converted("fireq-paper-linear", "llama"), tmp_path / "packed")


def test_results_are_saved_beside_the_model(pq: Call, packed: Path, tiny: Maker, text_file: Path):
    before = {p: p.read_bytes() for p in packed.iterdir()}
    args = ("--baseline", tiny("llama"), "--dataset", text_file, "--seqlen", 24, "--max-windows", 5)
    code, out, err = pq("eval", packed, *args, "--json")
    assert code == 0, err
    assert {p: p.read_bytes() for p in packed.iterdir()} == before
    folder = packed.with_name("packed.eval")
    saved = json.loads((folder / "strided-24-text.txt-kernel.json").read_text())
    assert saved == {"kind": "perplexity"} | json.loads(out)
    table = pyarrow.parquet.read_table(folder / "strided-24-text.txt-kernel.parquet")
    assert table.num_rows == saved["tokens"] == 5 * 23
    assert sum(table["kld"].to_pylist()) / 115 == pytest.approx(saved["kld_mean"], rel=1e-5)
    pq("eval", packed, *args, "--numerics", "stock", "--json")
    assert len(list(folder.iterdir())) == 4
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_nothing_is_written_beside_models_that_pq_did_not_make(
    pq: Call, tiny: Maker, text_file: Path, tmp_path: Path
):
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    args = ("eval", model, "--dataset", text_file, "--seqlen", 24, "--max-windows", 2)
    assert pq(*args)[0] == 0
    assert list(tmp_path.iterdir()) == [model]
    assert pq(*args, "--output_path", tmp_path / "results")[0] == 0
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_protocol_and_context_reach_the_figures(pq: Call, packed: Path, text_file: Path):
    text = ("--dataset", text_file, "--seqlen", 24)
    strided = json.loads(pq("eval", packed, *text, "--max-windows", 3, "--context", 8, "--json")[1])
    assert strided["protocol"] == "strided-24-context-8"
    rolling = json.loads(
        pq("eval", packed, *text, "--max_windows", 3, "--protocol", "rolling", "--json")[1]
    )
    assert rolling["protocol"] == "rolling-24"
    assert rolling["tokens"] == 72
    assert rolling["byte_perplexity"] > 1


def test_the_table_names_protocol_data_tokens_and_numerics(
    pq: Call, packed: Path, tiny: Maker, text_file: Path
):
    args = ("--baseline", tiny("llama"), "--dataset", text_file, "--seqlen", 24, "--max-windows", 3)
    _, out, err = pq("eval", packed, *args)
    for part in (
        "strided-24",
        "text.txt",
        "69 predictions",
        "kernel numerics",
        "KLD p99.9",
        "same top-1",
        "4.125",
    ):
        assert part in out, part
    assert max(map(len, out.splitlines())) <= 80
    assert "packed.eval" in err


def questions(path: Path, n: int = 12) -> Path:
    rows = [
        {
            "id": i,
            "query": f"What is {i}?",
            "choices": [f"It is {i}.", "A fox.", "Bits"],
            "gold": i % 3,
        }
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_tasks_alone_and_with_perplexity(
    pq: Call, packed: Path, tiny: Maker, text_file: Path, tmp_path: Path
):
    task = f"multiple_choice:{questions(tmp_path / 'quiz.jsonl')}"
    code, out, err = pq(
        "eval", packed, "--baseline", tiny("llama"), "--tasks", task, "--limit", 10, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == {"tasks"}
    scores = {(s["task"], s["metric"]): s for s in found["tasks"]["scores"]}
    assert scores["quiz", "acc"]["n"] == 10
    assert {"value", "baseline", "difference_stderr", "recovery"} <= set(scores["quiz", "acc"])
    assert "samples" not in found["tasks"]
    both = json.loads(
        pq("eval", packed, "--tasks", task, "--dataset", text_file, "--seqlen", 24, "--json")[1]
    )
    assert both["protocol"] == "strided-24"
    assert both["tasks"]["scores"] == []
    names = {p.name for p in packed.with_name("packed.eval").iterdir()}
    assert "tasks-quiz-kernel.json" in names


def test_both_spellings_of_lm_evals_options(pq: Call, packed: Path, tmp_path: Path):
    task = f"multiple_choice:{questions(tmp_path / 'quiz.jsonl')}"
    results = []
    for options in (
        (
            "--num_fewshot",
            1,
            "--batch_size",
            2,
            "--log_samples",
            "--output_path",
            tmp_path / "a",
            "--model_args",
            "max_length=64",
        ),
        (
            "--num-fewshot",
            1,
            "--batch-size",
            2,
            "--log-samples",
            "--output-path",
            tmp_path / "b",
            "--model-args",
            "max_length=64",
        ),
    ):
        code, out, err = pq("eval", packed, "--tasks", task, *options, "--json")
        assert code == 0, err
        results.append(json.loads(out))
    assert results[0] == results[1]
    assert results[0]["tasks"]["num_fewshot"] == {"quiz": 1}
    lines = (tmp_path / "a" / "samples" / "packed" / "samples_quiz.jsonl").read_text().splitlines()
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval"], "name the model folder"),
        (["eval", "MODEL", "--update-baselines"], "belong to --gate"),
        (["eval", "MODEL", "--protocol", "sliding"], "choose strided or rolling"),
        (["eval", "MODEL", "--context", "600"], "below seqlen 512"),
        (["eval", "MODEL", "--protocol", "rolling", "--context", "6"], "strided protocol"),
        (["eval", "MODEL", "--tasks", "perplexity:TEXT", "--model_args", "dtype"], "key=value"),
        (["eval", "PLAIN", "--tasks", "perplexity:TEXT", "--log_samples"], "--output-path"),
        (["eval", "--gate", "GATE", "--update-baselines"], "--reason"),
        (
            ["compare", "MODEL", "--baseline", "PLAIN", "--numerics", "exact"],
            "choose kernel or stock",
        ),
    ],
)
def test_mistakes(
    pq: Call, packed: Path, tiny: Maker, text_file: Path, arguments: list[str], says: str
):
    names = {"MODEL": str(packed), "PLAIN": str(tiny("llama")), "GATE": "gate.yaml"}
    given = [names.get(a, a.replace("TEXT", str(text_file))) for a in arguments]
    code, out, err = pq(*given)
    assert code == 2
    assert says in err
    assert err.count("pq: error:") == 1
    assert out == ""


def test_compare(pq: Call, converted: Maker, tiny: Maker, text_file: Path, tmp_path: Path):
    models = [
        shutil.copytree(converted("rtn", "llama", f"bits={b}"), tmp_path / f"w{b}")
        for b in (2, 3, 4)
    ]
    args = ("--baseline", tiny("llama"), "--dataset", text_file, "--seqlen", 24, "--max-windows", 4)
    code, out, err = pq("compare", *models, *args, "--json", "--output", tmp_path / "page.html")
    assert code == 0, err
    found = json.loads(out)
    assert [f["model"] for f in found] == ["w2", "w3", "w4"]
    assert [f["bits_per_weight"] for f in found] == [2.125, 3.125, 4.125]
    assert found[0]["kld_mean"] > found[1]["kld_mean"] > found[2]["kld_mean"]
    assert found[0]["bytes"] < found[2]["bytes"]
    alone = evaluate(models[1], tiny("llama"), dataset=str(text_file), seqlen=24, max_windows=4)
    assert found[1]["kld_mean"] == alone.kld_mean
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1
    assert all(f">{name}<" in page for name in ("w2", "w3", "w4"))
    _, table, _ = pq("compare", *models, *args)
    assert table.count("*") == 4  # each is the best at its bits, and the legend
    assert max(map(len, table.splitlines())) <= 80


def test_compare_refuses_models_of_other_vocabularies(pq: Call, tiny: Maker, text_file: Path):
    others = [tiny("llama"), tiny("llama", vocab_size=310)]
    code, _, err = pq("compare", *others, "--baseline", tiny("llama"), "--dataset", text_file)
    assert code == 5
    assert "vocabular" in err
