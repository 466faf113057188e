"""Tasks: scores against plain torch, statistics against the bootstrap, messages, silence, no network."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from quantize.errors import DataError, ModelError, OutputError, PqError, UsageError
from quantize.model.load import load_model

pytest.importorskip("lm_eval", reason="tasks need lm-eval")

from quantize.evaluation import task_sources
from quantize.evaluation.harness import run_tasks
from quantize.evaluation.task_comparison import compare_tasks
from quantize.evaluation.task_model import TaskModel
from quantize.evaluation.task_results import TaskRun, figures_of
from quantize.evaluation.task_scores import aggregate, aggregation_of, influence, standard_error

CPU = torch.device("cpu")
Maker = Callable[..., Path]

QUESTIONS = [
    {
        "id": f"q{i}",
        "query": f"What follows {i}, {word}?",
        "choices": choices,
        "gold": i % len(choices),
        "note": i,
    }
    for i, (word, choices) in enumerate(
        [
            ("fox", ["the dog", "a lazy dog jumps", "fewer bits"]),
            ("dog", ["yes", "no"]),
            ("Straße", ["naïve and long-winded bytes", "ASCII", "x", "量子化"]),
            ("model", ["its parent says so", "its parent says no"]),
            ("one", ["1", "2", "3"]),
            ("two", ["b", "another one of those", "c"]),
            ("bits", ["quantized well", "badly"]),
            ("end", ["and the dog", "without names"]),
        ]
    )
]
PASSAGES = [
    "The quick brown fox jumps over the lazy dog",
    "A model that is quantized well says the same things ",
    "Numbers such as 3.14159 have names",
]


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tasks")
    text = folder / "book.txt"
    text.write_text("\n".join(PASSAGES * 2) + "\n", encoding="utf-8")
    return {
        "quiz": f"multiple_choice:{lines(folder / 'quiz.jsonl', QUESTIONS)}",
        "last": f"lambada:{lines(folder / 'last.jsonl', [{'text': text} for text in PASSAGES])}",
        "book": f"perplexity:{text}",
        "pages": f"perplexity:{lines(folder / 'pages.jsonl', [{'text': text} for text in PASSAGES])}",
    }


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any use of the network fails the test, even where the error would be caught."""
    tried: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        tried.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not tried


@pytest.fixture(scope="module")
def quiz_runs(tiny: Maker, converted: Maker, files: dict[str, str]) -> tuple[TaskRun, TaskRun]:
    tasks = [files["quiz"], files["last"], files["pages"]]
    return run_tasks(converted("rtn", "llama", "bits=3"), tasks), run_tasks(tiny("llama"), tasks)


# Scores


def log_probabilities(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1)


def continuation(model: Any, tokenizer: Any, context: str, text: str) -> tuple[float, bool]:
    """Log-likelihood of `text` after `context`, and whether it is what greedy decoding gives."""
    before, ids = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (context, context + text)
    )
    rows = log_probabilities(model, ids)[len(before) - 1 :]
    wanted = ids[len(before) :]
    return sum(float(row[t]) for row, t in zip(rows, wanted, strict=True)), rows.argmax(
        -1
    ).tolist() == wanted


@pytest.mark.parametrize("packed", [False, True])
def test_multiple_choice_by_its_definition(
    packed: bool, tiny: Maker, converted: Maker, files: dict[str, str], offline: None
):
    folder = converted("fireq-paper-linear", "qwen2") if packed else tiny("qwen2")
    run = run_tasks(folder, [files["quiz"]])
    model, tokenizer = load_model(folder, CPU, torch.float32), AutoTokenizer.from_pretrained(folder)
    right, right_by_length = [], []
    for row in QUESTIONS:
        context = f"Question: {row['query']}\nAnswer:"
        scores = [
            continuation(model, tokenizer, context, f" {choice}")[0] for choice in row["choices"]
        ]
        by_length = [
            score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)
        ]
        right.append(float(scores.index(max(scores)) == row["gold"]))
        right_by_length.append(float(by_length.index(max(by_length)) == row["gold"]))
    assert 0 < sum(right) < len(right)
    n = len(QUESTIONS)
    for metric, expected in (("acc", right), ("acc_norm", right_by_length)):
        figures = run.tasks["quiz"][metric]
        p = sum(expected) / n
        assert figures["value"] == pytest.approx(p)
        assert figures["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
        assert figures["higher_is_better"] is True
        assert run.samples["quiz"][metric] == {str(i): value for i, value in enumerate(expected)}
    assert run.n_samples == {"quiz": n}
    assert run.num_fewshot == {"quiz": 0}


def test_the_last_word_by_its_definition(tiny: Maker, files: dict[str, str], offline: None):
    folder = tiny("llama")
    run = run_tasks(folder, [files["last"]])
    model, tokenizer = load_model(folder, CPU, torch.float32), AutoTokenizer.from_pretrained(folder)
    pairs = [passage.rstrip().rsplit(" ", 1) for passage in PASSAGES]
    scores = [continuation(model, tokenizer, context, f" {word}") for context, word in pairs]
    mean = sum(score for score, _ in scores) / len(scores)
    assert run.tasks["last"]["perplexity"]["value"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert run.tasks["last"]["perplexity"]["higher_is_better"] is False
    assert run.tasks["last"]["acc"]["value"] == sum(greedy for _, greedy in scores) / len(scores)


def rolling(model: Any, ids: Sequence[int], window: int) -> float:
    """Log-likelihood of all `ids` after a BOS (0): full windows, the last one moved back to be full as well."""
    total, stream, done = 0.0, [0, *ids], 0
    while done < len(ids):
        end = min(done + window, len(ids))
        start = max(0, end - window)
        rows = log_probabilities(model, stream[start : end + 1])
        total += sum(float(rows[i - start][stream[i + 1]]) for i in range(done, end))
        done = end
    return total


@pytest.mark.parametrize("max_length", [None, 20])
def test_rolling_perplexity_by_its_definition(
    max_length: int | None, converted: Maker, files: dict[str, str], offline: None
):
    folder = converted("rtn", "qwen3")
    options = {} if max_length is None else {"max_length": str(max_length)}
    run = run_tasks(folder, [files["book"]], model_args=options)
    assert run.max_length == (max_length or 256)
    text = Path(files["book"].partition(":")[2]).read_text(encoding="utf-8")
    model, tokenizer = load_model(folder, CPU, torch.float32), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 60 < len(ids) <= 256
    total = rolling(model, ids, max_length or 256)
    words, size = len(re.split(r"\s+", text)), len(text.encode())
    found = {metric: figures["value"] for metric, figures in run.tasks["book"].items()}
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-3)
    assert found["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
    assert run.tasks["book"]["bits_per_byte"]["stderr"] is None  # of one document
    assert run.n_samples["book"] == 1


def test_numerics_and_dtype(converted: Maker, files: dict[str, str]):
    def perplexity(recipe: str, **arguments: str) -> float:
        run = run_tasks(converted(recipe, "llama"), [files["pages"]], model_args=arguments)
        assert run.numerics == arguments.get("numerics", "kernel")
        assert run.dtype == arguments.get("dtype", "float32")
        return float(run.tasks["pages"]["bits_per_byte"]["value"])

    assert perplexity("rtn") == perplexity("rtn", numerics="stock")
    assert perplexity("fireq-paper-linear") != perplexity("fireq-paper-linear", numerics="stock")
    narrow = perplexity("rtn", dtype="bfloat16")
    assert narrow != perplexity("rtn")
    assert narrow == pytest.approx(perplexity("rtn"), rel=0.02)


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_batches_do_not_change_scores(batch_size: str, tiny: Maker, files: dict[str, str]):
    tasks = [files["quiz"], files["pages"]]
    auto = run_tasks(tiny("mistral"), tasks, num_fewshot=1)
    fixed = run_tasks(tiny("mistral"), tasks, num_fewshot=1, batch_size=batch_size)
    assert fixed.task_hashes == auto.task_hashes
    assert fixed.samples["quiz"] == auto.samples["quiz"]
    for name, value in auto.samples["pages"]["bits_per_byte"].items():
        assert fixed.samples["pages"]["bits_per_byte"][name] == pytest.approx(value, rel=1e-5)


def test_auto_batches_are_bounded_by_tokens(tiny: Maker):
    folder = tiny("llama")
    model, tokenizer = load_model(folder, CPU, torch.float32), AutoTokenizer.from_pretrained(folder)
    lm = TaskModel(model, tokenizer, None, lambda what, done, total: None)
    lm._tokens_at_once = 64
    shapes: list[torch.Size] = []
    plain = lm._model_call
    lm._model_call = lambda inps, **kwargs: (shapes.append(inps.shape), plain(inps, **kwargs))[1]
    generator = random.Random(0)
    tokens = [
        [generator.randrange(300) for _ in range(generator.randrange(4, 40))] for _ in range(30)
    ]
    requests = [(None, ids[:-3], ids[-3:]) for ids in tokens]
    requests += [
        (None, tokens[0], [last]) for last in range(50)
    ]  # one sequence with 50 last tokens
    scores = lm._loglikelihood_tokens(requests)
    assert all(rows * length <= 64 for rows, length in shapes)
    assert max(rows for rows, _ in shapes) > 2
    assert len(shapes) < 30
    for (_, context, wanted), (score, _) in zip(requests, scores, strict=True):
        rows = log_probabilities(model, context + wanted)[len(context) - 1 :]
        assert score == pytest.approx(
            sum(float(r[t]) for r, t in zip(rows, wanted, strict=True)), rel=1e-4
        )


def test_memory_that_runs_out_halves_the_batch(tiny: Maker, monkeypatch: pytest.MonkeyPatch):
    folder = tiny("llama")
    model, tokenizer = load_model(folder, CPU, torch.float32), AutoTokenizer.from_pretrained(folder)
    lm = TaskModel(model, tokenizer, 16, lambda what, done, total: None)
    plain, most = lm._model_call, 3

    def limited(inps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if len(inps) > most:
            raise torch.OutOfMemoryError("full")
        return plain(inps, **kwargs)

    lm._model_call = limited
    requests = [(None, [5, i, 7], [9, i]) for i in range(20)]
    assert len(lm._loglikelihood_tokens(requests)) == 20
    most = 0
    with pytest.raises(UsageError, match=r"the logits of a window of 5 tokens .* max_length="):
        lm._loglikelihood_tokens(requests)


# Options


def test_few_shot_limit_and_chat(tiny: Maker, files: dict[str, str], tmp_path: Path, offline: None):
    run = run_tasks(
        tiny("llama"), [files["quiz"], files["book"]], num_fewshot=2, limit=3, apply_chat_template=True,
        log_samples=tmp_path / "samples",
    )  # fmt: skip
    assert run.n_samples == {"quiz": 3, "book": 1}
    assert run.num_fewshot == {"quiz": 2, "book": 0}
    assert (run.limit, run.chat_template) == (3, True)
    records = [
        json.loads(line)
        for line in (tmp_path / "samples" / "samples_quiz.jsonl").read_text().splitlines()
    ]
    assert [record["doc_id"] for record in records] == [0, 1, 2]
    for record in records:
        prompt = record["arguments"][0][0]
        # The chat template of the tiny models: <s>content</s>, so two examples, two answers and the question.
        assert prompt.count("Question:") == 3
        assert prompt.count("<s>") == prompt.count("</s>") == 5
        assert prompt.count(record["doc"]["query"]) == 1  # never its own example
        assert set(record["doc"]) == {"query", "choices", "gold"}
        assert record["acc"] == run.samples["quiz"]["acc"][str(record["doc_id"])]
    assert run_tasks(tiny("llama"), [files["quiz"]], limit=0.5).n_samples == {"quiz": 4}


def test_requests_that_are_too_long_are_counted(tiny: Maker, files: dict[str, str]):
    run = run_tasks(tiny("llama"), [files["quiz"]], model_args={"max_length": "32"})
    assert run.truncated > 0
    assert run_tasks(tiny("llama"), [files["quiz"]]).truncated == 0


def test_a_prefix_token_changes_rolling_scores(tiny: Maker, files: dict[str, str]):
    runs = [
        run_tasks(tiny("llama"), [files["pages"]], model_args=arguments)
        for arguments in ({}, {"prefix_token_id": "0"}, {"prefix_token_id": "7"})
    ]
    assert runs[0].samples == runs[1].samples != runs[2].samples


def test_nothing_reaches_standard_output(
    tiny: Maker, files: dict[str, str], capfd: pytest.CaptureFixture[str]
):
    calls: list[tuple[str, int, int]] = []
    run_tasks(
        tiny("llama"),
        list(files.values()),
        num_fewshot=1,
        progress=lambda *call: calls.append(call),
    )
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    assert calls[0] == ("scoring", 0, sum(len(row["choices"]) for row in QUESTIONS) + len(PASSAGES))
    assert calls[-1][1] == calls[-1][2]


def test_a_run_is_plain_data(quiz_runs: tuple[TaskRun, TaskRun]):
    run, _ = quiz_runs
    assert TaskRun(**json.loads(json.dumps(dataclasses.asdict(run), allow_nan=False))) == run
    assert run.model == "out"
    assert len(run.files["quiz"]["sha256"]) == 64
    assert run.files.keys() == run.tasks.keys() == run.samples.keys() == run.task_hashes.keys()


TASK_FILE = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}, cache_dir: CACHE}
test_split: test
output_type: OUTPUT
doc_to_text: "{{query}}"
doc_to_target: OTHER
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def task_file(folder: Path, quiz: str, **changes: str) -> Path:
    text = TASK_FILE
    chosen = {
        "FILE": quiz.partition(":")[2],
        "CACHE": str(folder / "cache"),
        "OUTPUT": "multiple_choice",
    }
    for name, value in (chosen | {"OTHER": "gold\ndoc_to_choice: choices"} | changes).items():
        text = text.replace(name, value)
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_a_task_file(
    tiny: Maker, files: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    path = task_file(tmp_path, files["quiz"])
    run = run_tasks(tiny("llama"), [str(path)])
    assert run.n_samples == {"mine": len(QUESTIONS)}
    assert run.tasks["mine"]["acc"]["stderr"] is not None
    assert capfd.readouterr() == ("", "")
    path.write_text("group: mine\ntask: [arc_easy]\n")
    refused(DataError, "holds a group; give the files of its tasks", tiny("llama"), [str(path)])
    path.write_text("task: [")
    refused(DataError, r"mine\.yaml: lm-eval cannot load it", tiny("llama"), [str(path)])


def test_generation(
    tiny: Maker, files: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    extra = "\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}"
    path = task_file(
        tmp_path, files["quiz"], OUTPUT="generate_until", OTHER='"{{query[:1]}}"' + extra
    )
    path.write_text(path.read_text().replace("metric: acc", "metric: exact_match"))
    calls: list[tuple[str, int, int]] = []
    run = run_tasks(tiny("llama"), [str(path)], limit=3, progress=lambda *call: calls.append(call))
    assert calls == [("generating", 0, 3), ("generating", 3, 3)]
    assert run.tasks["mine"]["exact_match"]["value"] in (0, 1 / 3, 2 / 3, 1)
    assert capfd.readouterr() == ("", "")
    path.write_text(path.read_text().replace("max_gen_toks: 4", "max_gen_toks: 400"))
    with pytest.raises(UsageError, match="max_length"):
        run_tasks(tiny("llama"), [str(path)], limit=3)


def test_a_group_is_pooled_over_its_documents():
    def record(document: int, value: float) -> dict[str, Any]:
        return {
            "doc_id": document,
            "filter": "none",
            "metrics": ["acc"],
            "acc": value,
            "doc_hash": f"{document}",
        }

    values = {"one": [0.0, 1.0, 1.0], "two": [1.0, 0.0, 0.0, 0.0, 1.0]}
    means = {task: sum(v) / len(v) for task, v in values.items()}

    def results(value: float) -> dict[str, Any]:
        return {
            "results": {task: {"alias": task, "acc,none": v, "acc_stderr,none": "N/A"} for task, v in means.items()},
            "groups": {"outer": {"alias": "outer", "acc,none": value, "acc_stderr,none": "N/A"}},
            "group_subtasks": {"outer": ["inner", "two"], "inner": ["one"]},
            "higher_is_better": {task: {"acc": True} for task in ("one", "two", "outer")},
            "n-shot": dict.fromkeys(values, 0),
            "versions": dict.fromkeys(values, 1),
            "samples": {task: [record(i, value) for i, value in enumerate(v)] for task, v in values.items()},
        }  # fmt: skip

    everything = values["one"] + values["two"]
    found = figures_of(results(sum(everything) / 8))
    assert found["groups"] == {"outer": ["one", "two"]}
    assert found["n_samples"] == {"one": 3, "two": 5, "outer": 8}
    error = torch.tensor(everything).std().item() / 8**0.5
    assert found["tasks"]["outer"]["acc"]["stderr"] == pytest.approx(error)
    assert list(found["samples"]["outer"]["acc"].values()) == everything
    # A mean of the tasks' means is another number, for which there is no standard error.
    unweighted = figures_of(results(sum(means.values()) / 2))
    assert unweighted["tasks"]["outer"]["acc"]["stderr"] is None
    assert unweighted["samples"]["outer"] == {}


# Refusals

Q = '{"query": "a", "choices": ["b", "c"], "gold": 0}'


@pytest.mark.parametrize(
    ("template", "text", "says"),
    [
        ("multiple_choice", f"{Q}\n{{", r'line 2: not a JSON object; each line is \{"query": "…"'),
        ("multiple_choice", f"{Q}\n\n[1]", "line 3: not a JSON object"),
        ("multiple_choice", '{"query": "a", "gold": 0}', "line 1: no field 'choices'"),
        ("multiple_choice", '{"query": "a", "choices": ["b", "c"], "gold": 2}', "'gold': give the index .* 0 to 1"),
        ("multiple_choice", '{"query": "a", "choices": ["b", "c"], "gold": true}', "field 'gold': give the index"),
        ("multiple_choice", '{"query": "a", "choices": ["b", "c"], "gold": "0"}', "field 'gold': give the index"),
        ("multiple_choice", '{"query": "a", "choices": ["b"], "gold": 0}', "field 'choices': give a list of at least"),
        ("multiple_choice", '{"query": "a", "choices": ["b", " "], "gold": 0}', "'choices': give text that"),
        ("multiple_choice", '{"query": 3, "choices": ["b", "c"], "gold": 0}', "field 'query': give text"),
        ("multiple_choice", '{"query": "\\ud800", "choices": ["b", "c"], "gold": 0}', "half of a surrogate pair"),
        ("multiple_choice", "\n \n", "holds no documents"),
        ("lambada", '{"text": "word "}', "line 1, field 'text': .*at least two words"),
        ("perplexity", '{"words": "a b"}', "line 1: no field 'text'"),
        ("perplexity", b'{"text": "a"}\n\xff', "line 2: not UTF-8"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(
    template: str, text: str | bytes, says: str, tiny: Maker, tmp_path: Path
):
    path = tmp_path / "file.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(DataError, says, tiny("llama"), [f"{template}:{path}"])


def refused(
    kind: type[PqError], says: str, folder: Path, tasks: Sequence[str], **options: Any
) -> None:
    with pytest.raises(kind, match=says) as caught:
        run_tasks(folder, tasks, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_args": {"max_len": "3"}}, "max_len=3: unknown; choose among dtype, numerics, max_length, add"),
        ({"model_args": {"max_length": "0"}}, "max_length=0: give a positive whole number"),
        ({"model_args": {"add_bos_token": "maybe"}}, "add_bos_token=maybe: give true or false"),
        ({"model_args": {"dtype": "int8"}}, "dtype=int8: choose among float32, bfloat16, float16"),
        ({"model_args": {"numerics": "exact"}}, "numerics=exact: choose kernel or stock"),
        ({"model_args": {"prefix_token_id": "300"}}, "prefix_token_id=300 is outside the model's vocabulary of 300"),
        ({"batch_size": "many"}, "batch size many"),
        ({"batch_size": "0"}, "batch size 0"),
        ({"num_fewshot": -1}, "few-shot examples -1"),
        ({"num_fewshot": 8}, "task quiz: 8 few-shot examples and one question need more than 8 lines"),
        ({"limit": 0}, "limit 0"),
        ({"limit": 1.5}, "limit 1.5"),
        ({"limit": math.nan}, "limit nan"),
        ({"limit": math.inf}, "limit inf"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing(
    options: dict[str, Any], says: str, tiny: Maker, files: dict[str, str]
):
    refused(UsageError, says, tiny("llama"), [files["quiz"]], **options)


def test_without_lm_eval(tiny: Maker, files: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "quantize.evaluation.task_model")
    monkeypatch.delattr("quantize.evaluation.task_model")
    refused(
        UsageError,
        r"tasks need lm-eval .* pip install -U 'lm-eval>=0.4.12'",
        tiny("llama"),
        [files["quiz"]],
    )


def test_names_that_mean_nothing(
    tiny: Maker, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tiny("llama")
    quiz = files["quiz"].partition(":")[2]
    refused(UsageError, "no task given", folder, [])
    refused(UsageError, "did you mean multiple_choice:", folder, [f"multiple_choise:{quiz}"])
    refused(
        UsageError,
        r"TEMPLATE:FILE with TEMPLATE among lambada, multiple_choice, perplexity",
        folder,
        [quiz],
    )
    refused(DataError, r"no\.yaml: no such task file", folder, [str(tmp_path / "no.yaml")])
    refused(DataError, r"no\.jsonl cannot be read", folder, [f"lambada:{tmp_path / 'no.jsonl'}"])
    refused(DataError, "cannot be read", folder, [f"lambada:{tmp_path}"])
    refused(UsageError, "would both report as 'quiz'", folder, [files["quiz"], files["quiz"]])
    monkeypatch.setattr(
        task_sources, "library", lambda: pytest.fail("offline tasks need no index of the library")
    )
    refused(UsageError, "batch size x", folder, [files["quiz"]], batch_size="x")


def test_the_library(tiny: Maker, monkeypatch: pytest.MonkeyPatch):
    refused(
        UsageError, "unknown task 'arc_esy'; did you mean .*arc_easy", tiny("llama"), ["arc_esy"]
    )
    calls = []

    def unreachable(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    says = r"task arc_easy: .*Hub \(ConnectionError: Couldn't reach.*TEMPLATE:FILE"
    refused(DataError, says, tiny("llama"), ["arc_easy"])
    assert calls


def test_models_that_do_not_fit(tiny: Maker, files: dict[str, str], tmp_path: Path):
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    refused(DataError, "no chat template", folder, [files["quiz"]], apply_chat_template=True)
    refused(
        OutputError, "cannot be made", folder, [files["quiz"]], log_samples=folder / "config.json"
    )
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        token: i + 100 for token, i in tokenizer["model"]["vocab"].items()
    }
    for added in tokenizer["added_tokens"]:
        added["id"] += 100
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(DataError, "outside the model's vocabulary of 300", folder, [files["quiz"]])


def test_a_model_that_computes_nan(
    tiny: Maker, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        TaskModel, "_model_call", lambda self, inps: torch.full((*inps.shape, 300), math.nan)
    )
    refused(ModelError, "logits are not finite", tiny("llama"), [files["quiz"]])


# Statistics


def run_of(model: str, values: dict[str, list[Any]], **changes: Any) -> TaskRun:
    """A run of one task "t" with hand-made values for each aggregation, named as its metric."""
    higher = {"mean"}
    tasks, samples = {}, {}
    for name, documents in values.items():
        kind: Any = name
        value = aggregate(kind, documents)
        error = standard_error(influence(kind, documents))
        tasks[name] = {
            "value": value,
            "stderr": error,
            "higher_is_better": name in higher,
            "aggregation": name,
        }
        samples[name] = {str(i): document for i, document in enumerate(documents)}
    n = len(next(iter(values.values())))
    fields: dict[str, Any] = {
        "model": model, "tasks": {"t": tasks}, "n_samples": {"t": n}, "num_fewshot": {"t": 0}, "groups": {},
        "limit": None, "chat_template": False, "model_args": {}, "max_length": 8, "truncated": 0, "numerics": "kernel",
        "dtype": "float32", "versions": {}, "task_versions": {}, "task_hashes": {"t": "x"}, "files": {},
        "samples": {"t": samples},
    }  # fmt: skip
    return TaskRun(**(fields | changes))


def made_up(n: int, seed: int) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Values of a model and of its parent on n documents; they agree mostly, since documents differ in difficulty."""
    g = random.Random(seed)
    hard = [g.gauss(0, 1) for _ in range(n)]
    weights = [g.randint(20, 60) for _ in range(n)]

    def values(shift: float) -> dict[str, list[Any]]:
        likelihood = [-4 + 0.8 * h - shift + g.gauss(0, 0.1) for h in hard]
        pairs = [[x * w, float(w)] for x, w in zip(likelihood, weights, strict=True)]
        right = [float(x > -4) for x in likelihood]
        return {
            "mean": right,
            "perplexity": likelihood,
            "weighted_perplexity": pairs,
            "bits_per_byte": pairs,
        }

    return values(0.1), values(0.0)


def test_errors_agree_with_the_bootstrap():
    ours, parents = made_up(400, seed=1)
    scores = {
        score.metric: score for score in compare_tasks(run_of("a", ours), run_of("b", parents))
    }
    g = torch.Generator().manual_seed(0)
    draws = torch.randint(400, (600, 400), generator=g).tolist()
    for metric, score in scores.items():
        kind: Any = metric
        a = torch.tensor(
            [aggregate(kind, [ours[metric][i] for i in draw]) for draw in draws],
            dtype=torch.float64,
        )
        b = torch.tensor(
            [aggregate(kind, [parents[metric][i] for i in draw]) for draw in draws],
            dtype=torch.float64,
        )
        ratio = a / b if metric == "mean" else b / a
        assert score.stderr == pytest.approx(float(a.std()), rel=0.12)
        assert score.baseline_stderr == pytest.approx(float(b.std()), rel=0.12)
        assert score.difference_stderr == pytest.approx(float((a - b).std()), rel=0.12)
        assert score.recovery_stderr == pytest.approx(float(ratio.std()), rel=0.12)
        assert score.recovery == pytest.approx(
            score.value / score.baseline if metric == "mean" else score.baseline / score.value
        )
        assert (
            score.difference_stderr < 0.6 * score.stderr
        )  # pairing is what makes the comparison sharp


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_accuracies_against_the_textbook(answers: list[tuple[bool, bool]]):
    ours, parents = ([float(pair[i]) for pair in answers] for i in (0, 1))
    (score,) = compare_tasks(run_of("a", {"mean": ours}), run_of("b", {"mean": parents}))
    n = len(answers)
    differences = torch.tensor(
        [a - b for a, b in zip(ours, parents, strict=True)], dtype=torch.float64
    )
    assert score.difference == pytest.approx(float(differences.mean()))
    assert score.difference_stderr == pytest.approx(
        float(differences.std()) / math.sqrt(n), abs=1e-12
    )
    assert score.n == n
    assert (score.recovery is None) == (score.recovery_stderr is None) == (sum(parents) == 0)
    if sum(parents):
        assert score.recovery == pytest.approx(sum(ours) / sum(parents))
        if ours == parents:
            assert score.recovery == 1
            assert score.recovery_stderr == 0


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_influences_are_derivatives(values: list[float]):
    for kind in ("mean", "perplexity"):
        found = influence(kind, values)
        assert math.fsum(found) == pytest.approx(0, abs=1e-6 * max(1, aggregate(kind, values)))
        # The first document once more, with weight ε n: the metric moves by ε × influence.
        n, epsilon = len(values), 1e-6
        mean = (math.fsum(values) + epsilon * n * values[0]) / (n + epsilon * n)
        moved = mean if kind == "mean" else math.exp(-mean)
        change = (moved - aggregate(kind, values)) / epsilon
        assert change == pytest.approx(
            found[0], rel=1e-3, abs=1e-4 * max(1, aggregate(kind, values))
        )
    assert standard_error(influence("mean", values[:1])) is None


def test_what_made_a_number():
    assert aggregation_of([0.0, 1.0], 0.5) == "mean"
    assert aggregation_of([-1.0, -2.0], math.exp(1.5)) == "perplexity"
    assert aggregation_of([[-6.0, 2.0], [-2.0, 2.0]], math.exp(2)) == "weighted_perplexity"
    assert aggregation_of([[-6.0, 2.0], [-2.0, 2.0]], 2 / math.log(2)) == "bits_per_byte"
    assert aggregation_of([0.0, 1.0], 0.7) is None
    assert aggregation_of([[0.0, 1.0]], 0.7) is None
    assert aggregation_of([], 0.7) is None
    assert aggregation_of([1.0], math.nan) is None
    assert aggregate("perplexity", [-1e4]) == math.inf


def test_comparing_a_quantized_model(quiz_runs: tuple[TaskRun, TaskRun]):
    ours, parents = quiz_runs
    scores = compare_tasks(ours, parents)
    assert [(s.task, s.metric) for s in scores] == [
        (t, m) for t, metrics in ours.tasks.items() for m in metrics
    ]
    for score in scores:
        assert score.paired
        assert score.difference == score.value - score.baseline
        better = (
            score.value > score.baseline if score.higher_is_better else score.value < score.baseline
        )
        assert (score.recovery is not None and score.recovery > 1) == better
    json.dumps([dataclasses.asdict(score) for score in scores], allow_nan=False)
    again = TaskRun(**json.loads(json.dumps(dataclasses.asdict(parents))))
    assert compare_tasks(ours, again) == scores
    same = compare_tasks(parents, again)
    assert all(
        s.difference == s.difference_stderr == 0 and s.recovery == 1 for s in same if s.baseline
    )


def test_scores_that_cannot_be_compared():
    values = {"mean": [0.0, 1.0, 1.0]}
    ours = run_of("a", values)
    for parents, says in (
        (run_of("b", values, task_hashes={"t": "y"}), "task t: a and b were not asked the same"),
        (run_of("b", values, tasks={}), "task t was run on one of a and b only"),
        (run_of("b", {"perplexity": [0.0, -1.0, -1.0]}), "b has no mean"),
    ):
        with pytest.raises(DataError, match=says):
            compare_tasks(ours, parents)
    for parents in (
        run_of("b", values, samples={}),
        run_of("b", values, samples={"t": {"mean": {"7": 1.0}}}),
    ):
        (score,) = compare_tasks(ours, parents)
        assert not score.paired
        assert score.difference_stderr is score.recovery_stderr is None
        assert score.recovery == 1
    (hopeless,) = compare_tasks(ours, run_of("b", {"mean": [0.0, 0.0, 0.0]}))
    assert hopeless.recovery is hopeless.recovery_stderr is None
    assert hopeless.difference_stderr == pytest.approx(1 / 3)


@pytest.mark.shared
def test_arc_easy_on_the_reference_model(shared_dir: Path, offline: None):
    reference = Path(__file__).resolve().parents[2] / "eval" / "reference-model"
    run = run_tasks(
        reference, [f"multiple_choice:{shared_dir / 'text' / 'arc_easy.jsonl'}"], limit=20
    )
    assert run.n_samples == {"arc_easy": 20}
    first = json.loads((shared_dir / "text" / "arc_easy.jsonl").read_text().splitlines()[0])
    model, tokenizer = (
        load_model(reference, CPU, torch.float32),
        AutoTokenizer.from_pretrained(reference),
    )
    context = f"Question: {first['query']}\nAnswer:"
    scores = [
        continuation(model, tokenizer, context, f" {choice}")[0] for choice in first["choices"]
    ]
    assert run.samples["arc_easy"]["acc"]["0"] == float(scores.index(max(scores)) == first["gold"])
