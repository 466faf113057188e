"""Tasks whose texts begin with BOS, or do not, as --bos says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_added_bos
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize.errors import UsageError

pytest.importorskip("lm_eval", reason="tasks need lm-eval")

from quantize.evaluation.harness import run_tasks
from quantize.evaluation.task_model import TaskModel
from quantize.evaluation.task_results import TaskRun

Maker = Callable[..., Path]
PASSAGES = ["The quick brown fox jumps over the lazy dog", "A model that is quantized well says so"]
BOS = 0


@pytest.fixture(scope="module")
def folders(tiny: Maker, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Whether its tokenizer adds BOS → one and the same model."""
    plain = tiny("llama")
    return {
        False: plain,
        True: with_added_bos(plain, tmp_path_factory.mktemp("tokenizers") / "bos"),
    }


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "last.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in PASSAGES))
    return f"lambada:{path}"


def value(run: TaskRun) -> float:
    return float(run.tasks["last"]["perplexity"]["value"])


def by_hand(folder: Path, front: Sequence[int]) -> float:
    """exp of the mean NLL of the last words, each passage behind `front`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nll = 0.0
    for passage in PASSAGES:
        context = passage.rpartition(" ")[0]
        before, ids = (
            [*front, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            for text in (context, passage)
        )
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nll -= sum(float(log_p[i - 1, ids[i]]) for i in range(len(before), len(ids)))
    return float(torch.tensor(nll / len(PASSAGES)).double().exp())


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_texts_begin_as_they_shall(folders: dict[bool, Path], task: str, adds: bool, bos: Any):
    run = run_tasks(folders[adds], [task], bos=bos)
    begins = bos == "always" or (bos == "auto" and adds)
    assert value(run) == pytest.approx(by_hand(folders[adds], [BOS] if begins else []), rel=1e-4)
    assert run.bos_token_id == (BOS if begins else None)


def test_warning_and_contradiction(
    folders: dict[bool, Path], task: str, caplog: pytest.LogCaptureFixture
):
    run_tasks(folders[False], [task], bos="never")
    assert not caplog.messages
    run_tasks(folders[True], [task], bos="never")
    assert [("begins texts with BOS" in message) for message in caplog.messages] == [True]
    with pytest.raises(UsageError, match="bos never and the model argument add_bos_token"):
        run_tasks(folders[True], [task], bos="never", model_args={"add_bos_token": "true"})
    off = run_tasks(folders[True], [task], model_args={"add_bos_token": "false"})
    assert off.bos_token_id is None


def test_prompts_of_several_lengths(folders: dict[bool, Path]):
    """Generation takes prompts as a padded batch; a BOS that a prompt has is not doubled."""
    model = AutoModelForCausalLM.from_pretrained(folders[False], dtype=torch.float32)
    prompts = ["<s>The quick brown", "A model", "The lazy dog, and"]
    plain = AutoTokenizer.from_pretrained(folders[False])
    wanted = [plain(text.removeprefix("<s>"))["input_ids"] for text in prompts]
    lm = TaskModel(model, plain, None, lambda what, done, total: None, bos=BOS)
    for side in ("left", "right"):
        ids, mask = lm.tok_batch_encode(prompts, padding_side=side)
        assert ids.shape == (3, 1 + max(map(len, wanted)))
        assert (mask[:, 0] == 1).tolist() == [
            side == "right" or n == 1 + max(map(len, wanted)) for n in (len(w) + 1 for w in wanted)
        ]
        rows = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
        assert rows == [[BOS, *row] for row in wanted]
    ids, mask = lm.tok_batch_encode(prompts, left_truncate_len=3)
    assert [row.tolist() for row in ids] == [[BOS, *row][-3:] for row in wanted]
    assert mask.all()
    assert lm.tok_encode(prompts[1]) == [BOS, *wanted[1]]
    assert lm.tok_encode(prompts[0]) == [BOS, *wanted[0]]
    assert lm.tok_encode(prompts[1], add_special_tokens=False) == wanted[1]
    assert lm.tok_encode(prompts[2], left_truncate_len=2) == wanted[2][-2:]
