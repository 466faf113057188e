"""Several processes measure what one process measures, to the last bit."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, save_side_files
from processes import HANGS, REMEDY, Launch, launch, pq
from test_processes_launchers import LAUNCHERS
from transformers import AutoConfig, AutoModelForCausalLM

from quantize.evaluation import run, streamed
from quantize.evaluation.records import Records
from quantize.formats.routing import TopK
from quantize.model.load import load_model
from quantize.model.tokenizer import load_tokenizer
from quantize.parallel.launch import join

SEQLEN = 24
CPU = torch.device("cpu")
Before = Callable[[int], None]


@pytest.fixture(autouse=True)
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows a pass, and at most two passes of the tiny models' hidden states at once."""
    monkeypatch.setattr(streamed, "_BATCH_TOKENS", 2 * SEQLEN)
    monkeypatch.setattr(run, "_HIDDEN_BYTES", 5 * SEQLEN * 128 * 4)


class Command:
    """`pq eval` of one model with any number of processes; each start has a folder of its own for its results."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder, self.arguments, self.starts = folder, arguments, 0

    def start(self, size: int, *more: object, before: Before | None = None) -> Launch:
        self.starts += 1
        self.here = self.folder / f"start-{self.starts}"
        told = [
            "eval",
            *self.arguments,
            "--device",
            "cpu",
            "--output-path",
            self.here / "results",
            "--json",
            *more,
        ]

        def prepared(rank: int) -> None:
            sys.stdout = (self.here / f"printed-{rank}").open("w", buffering=1)
            if before is not None:
                before(rank)

        return pq(size, told, self.here, prepared)

    def found(self, size: int) -> tuple[str, dict[str, bytes]]:
        """What the first rank prints, and the files of the results; the other ranks say nothing."""
        done = self.start(size)
        assert done.wait() == [0] * size, done.texts()
        printed, *others = [(self.here / f"printed-{rank}").read_text() for rank in range(size)]
        assert others == done.texts()[1:] == [""] * (size - 1)
        results = self.here / "results"
        return printed, {
            str(p.relative_to(results)): p.read_bytes() for p in results.rglob("*") if p.is_file()
        }


def same(command: Command, *sizes: int) -> dict[str, Any]:
    """What these numbers of processes and one print, of which the files do not differ either."""
    printed, files = command.found(1)
    assert files
    for size in sizes:
        assert command.found(size) == (printed, files)
    found: dict[str, Any] = json.loads(printed)
    return found


def text_options(text: Path, windows: int, *more: object) -> list[object]:
    return ["--dataset", text, "--seqlen", SEQLEN, "--max-windows", windows, *more]


# Nine windows are five passes: three ranks have two, two and one. Three windows leave the third rank without any.
@pytest.mark.parametrize(
    ("recipe", "model_type", "windows", "sizes", "more"),
    [
        ("fireq-paper-linear", "llama", 9, (2, 3), ["--context", 8]),
        ("rtn", "qwen2_moe", 9, (2,), []),
        ("rtn", "qwen2_moe", 3, (3,), ["--protocol", "rolling"]),
    ],
)
def test_perplexity(
    tiny: ModelMaker, converted: ModelMaker, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    recipe: str, model_type: str, windows: int, sizes: Sequence[int], more: Sequence[object],
):  # fmt: skip
    model, parent = converted(recipe, model_type), tiny(model_type)
    # As many experts as suit a token, or the mean of all ranks would be that of each.
    monkeypatch.setattr(TopK, "select", lambda self, scores: scores >= scores.mean(1, keepdim=True))
    command = Command(
        tmp_path, model, "--baseline", parent, *text_options(text_file, windows, *more)
    )
    found = same(command, *sizes)
    assert found["windows"] == windows
    assert found["kld_mean"] > 0
    assert (found["experts_visited"] is None) == (model_type == "llama")


def test_a_model_that_is_loaded_whole_and_has_no_baseline(text_file: Path, tmp_path: Path):
    config = AutoConfig.for_model(
        "gpt2", vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    save_side_files(tmp_path / "model")
    same(Command(tmp_path, tmp_path / "model", *text_options(text_file, 5)), 2)


def test_tasks(
    tiny: ModelMaker,
    converted: ModelMaker,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    task_model = pytest.importorskip("quantize.evaluation.task_model")
    importlib.import_module("lm_eval.evaluator")  # once, not in every rank
    monkeypatch.setitem(task_model._MAX_TOKENS, "cpu", 80)
    rows = [
        {
            "query": f"What follows {i}?",
            "choices": [f"{i + 1} does", "a fox", "bits" * i],
            "gold": 0,
        }
        for i in range(1, 8)
    ]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "book.txt").write_text(text_file.read_text()[:800])
    tasks = f"multiple_choice:{tmp_path / 'quiz.jsonl'},perplexity:{tmp_path / 'book.txt'}"
    command = Command(
        tmp_path, converted("rtn", "llama"), "--baseline", tiny("llama"), "--tasks", tasks, "--num-fewshot", 1,
        "--model-args", "max_length=40", "--log-samples", *text_options(text_file, 4),
    )  # fmt: skip
    found = same(command, 2, 3)
    assert found["tokens"] == 4 * (SEQLEN - 1)
    assert {score["task"] for score in found["tasks"]["scores"]} == {"quiz", "book"}
    assert found["tasks"]["n_samples"]["quiz"] == 7


def test_generation_and_batches_that_do_not_fit(tiny: ModelMaker, tmp_path: Path):
    task_model = pytest.importorskip("quantize.evaluation.task_model")
    from lm_eval.api.instance import Instance

    kinds = [{"do_sample": False}, {"do_sample": True, "temperature": 1.5}]
    limits = {"max_gen_toks": 6, "until": ["zz"]}
    prompts = [f"The quick {i} fox" + " jumps" * i for i in range(7)]
    asked = [
        Instance("generate_until", {}, (prompt, limits | kind), i)
        for kind in kinds
        for i, prompt in enumerate(prompts)
    ]
    scored = [(None, [5, i, 7] * (1 + i % 4), [9, i]) for i in range(40)]
    shapes: list[int] = []

    def work(rank: int) -> None:
        with join(REMEDY, lambda err: os._exit(97)) as ranks:
            torch.manual_seed(0)
            model, tokenizer = (
                load_model(tiny("llama"), CPU, torch.float32),
                load_tokenizer(tiny("llama")),
            )
            lm = task_model.TaskModel(model, tokenizer, 2, lambda what, done, total: None, ranks)
            texts = lm.generate_until(asked)
            lm.fixed_batch, plain = 8, lm._model_call

            def limited(inps: torch.Tensor, **more: Any) -> torch.Tensor:
                if len(inps) > 5 or (inps.shape[1] > 6 and len(inps) > 2):
                    raise torch.OutOfMemoryError("full")
                shapes.append(len(inps))
                return plain(inps, **more)

            lm._model_call = limited
            found = {
                "texts": texts,
                "scores": lm._loglikelihood_tokens(scored),
                "tokens": lm._tokens_at_once,
            }
            (tmp_path / f"{ranks.size}-{rank}").write_text(json.dumps(found))
            (tmp_path / f"shapes-{ranks.size}-{rank}").write_text(json.dumps(shapes))

    for size in (1, 2, 3):
        done = launch(size, work, tmp_path / f"said{size}")
        assert done.wait() == [0] * size, done.texts()
    expected = json.loads((tmp_path / "1-0").read_text())
    assert len(set(expected["texts"])) > 7
    for size in (2, 3):
        assert all(
            json.loads((tmp_path / f"{size}-{rank}").read_text()) == expected
            for rank in range(size)
        )
    counts = [sum(json.loads((tmp_path / f"shapes-{name}").read_text())) for name in ("1-0", "3-0")]
    assert counts[1] < counts[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher(tiny: ModelMaker, text_file: Path, launcher: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        start = [sys.executable, "-m", *LAUNCHERS[launcher], str(free.getsockname()[1])]
    told = [
        "-m",
        "quantize",
        "eval",
        tiny("llama"),
        "--dataset",
        text_file,
        "--device",
        "cpu",
        "--json",
    ]
    printed = [
        subprocess.run(
            [*command, *map(str, told), "--seqlen", "256", "--context", "128"],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True, timeout=HANGS,
        ).stdout
        for command in ([sys.executable], start)
    ]  # fmt: skip
    assert json.loads(printed[0])["windows"] > 4096 / 256
    assert printed[0] == printed[1]


def test_a_dead_rank_ends_the_others(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    def before(rank: int) -> None:
        add = Records.add

        def dying(self: Records, window: int, *rest: Any) -> None:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, window, *rest)

        Records.add = dying  # type: ignore[method-assign]

    done = Command(tmp_path, tiny("llama"), *text_options(text_file, 9)).start(3, before=before)
    assert done.wait() == [75, -signal.SIGKILL, 75], done.texts()
    line = "pq: rank 1 no longer answers; start the command again\n"
    assert done.texts() == [line, "", line]


def test_what_all_ranks_find_is_said_once(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    def refused(*arguments: object) -> tuple[list[int], str]:
        done = Command(tmp_path / str(len(list(tmp_path.iterdir()))), *arguments).start(2)
        codes, (said, other) = done.wait(), done.texts()
        assert other == ""
        return codes, said

    line = "pq: error: --gate converts and measures in one process; start it without a launcher\n"
    assert refused("--gate", tmp_path / "gate.yaml") == ([2, 2], line)
    broken = shutil.copytree(tiny("llama"), tmp_path / "broken")
    (broken / "config.json").write_text("{")
    codes, said = refused(broken, *text_options(text_file, 3))
    assert codes == [4, 4]
    assert said.startswith("pq: error: ")


def test_ranks_that_measure_different_things(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    def before(rank: int) -> None:
        sys.argv += ["--numerics", "stock"] if rank else []

    done = Command(tmp_path, tiny("llama"), *text_options(text_file, 3)).start(2, before=before)
    assert done.wait() == [2, 2]
    assert "rank 1 differs from rank 0 in numerics: stock instead of kernel" in done.texts()[0]
