"""Perplexity protocols against plain implementations of their definitions, and against lm-eval itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import lm_eval.utils
import pytest
import torch
import torch.nn.functional as F
from conftest import with_added_bos
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize.errors import DataError, UsageError
from quantize.evaluation import evaluate
from quantize.evaluation.protocols import UNSCORED, Protocol, rolling_windows, windows_of
from quantize.model.load import load_model

CPU = torch.device("cpu")
Maker = Callable[..., Path]


def stream(folder: Path, text: Path) -> list[int]:
    return list(
        AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False)[
            "input_ids"
        ]
    )


def overlapping_nll(
    model: torch.nn.Module, ids: list[int], N: int, C: int, count: int
) -> list[float]:
    """Each token's NLL, by the definition: token by token which window scores it and what it saw."""
    out = []
    for k in range(count):
        start = k * (N - C)
        window = ids[start : start + N]
        with torch.no_grad():
            log_p = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        out += [-float(log_p[i - 1, window[i]]) for i in range(1 if k == 0 else max(1, C), N)]
    return out


@pytest.mark.parametrize("context", [0, 1, 8, 31])
def test_strided_perplexity_by_its_definition(tiny: Maker, text_file: Path, context: int):
    folder = tiny("llama")
    figures = evaluate(
        folder, None, dataset=str(text_file), seqlen=32, context=context, max_windows=5
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nll = overlapping_nll(model, stream(folder, text_file), 32, context, 5)
    assert figures.tokens == len(nll)
    assert figures.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert figures.protocol == "strided-32" + (f"-context-{context}" if context else "")
    assert figures.context == context


def test_with_context_every_token_but_the_first_is_predicted_once(tiny: Maker, text_file: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    windows = windows_of(Protocol("strided", 32, 20), tokenizer, str(text_file), 9, 512)
    scored = [int(token) for row in windows.targets for token in row if int(token) != UNSCORED]
    ids = stream(tiny("llama"), text_file)
    assert scored == ids[1 : 32 + 8 * 12]


def test_more_context_helps(tiny: Maker, text_file: Path, shared_dir: Path):
    folder = shared_dir / "models" / "yardstick"
    text = str(shared_dir / "text" / "wikitext2-test.txt")
    plain, better = (
        evaluate(folder, None, dataset=text, seqlen=64, context=c, max_windows=12) for c in (0, 48)
    )
    assert better.perplexity < 0.9 * plain.perplexity


def documents_file(tmp_path: Path) -> tuple[Path, list[str]]:
    texts = [
        "A short one.",
        "Bits  are\nwords, and words are bits. " * 6,
        "x",
        "",
        "Numbers: 1 2 3, ünïcode – dash. " * 3,
    ]
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path, texts


def harness(folder: Path, length: int) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=length, device="cpu"
    )


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("length", [16, 24])
def test_rolling_perplexity_is_that_of_lm_eval(
    tiny: Maker, tmp_path: Path, length: int, adds_bos: bool
):
    folder = tiny("llama")
    if adds_bos:
        folder = with_added_bos(folder, tmp_path / "bos")
    path, texts = documents_file(tmp_path)
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    total = -sum(harness(folder, length).loglikelihood_rolling(requests, disable_tqdm=True))
    words = sum(len(lm_eval.utils.re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    figures = evaluate(folder, None, protocol="rolling", dataset=str(path), seqlen=length)
    assert figures.protocol == f"rolling-{length}"
    assert figures.word_perplexity == pytest.approx(math.exp(total / words), rel=1e-4)
    assert figures.byte_perplexity == pytest.approx(math.exp(total / size), rel=1e-4)
    assert figures.bits_per_byte == pytest.approx(total / size / math.log(2), rel=1e-4)


@given(st.lists(st.integers(0, 99), max_size=40), st.integers(1, 12))
def test_rolling_windows_are_those_of_lm_eval(ids: list[int], length: int):
    theirs = list(lm_eval.utils.get_rolling_token_windows(ids, -7, length, 1))
    assert rolling_windows(ids, -7, length) == theirs
    assert [token for _, wanted in rolling_windows(ids, -7, length) for token in wanted] == ids


def test_padding_does_not_change_rolling_figures(tiny: Maker, tmp_path: Path):
    folder = tiny("qwen2")
    path, texts = documents_file(tmp_path)
    model = load_model(folder, CPU, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total = 0.0
    for text in texts:
        for read, wanted in rolling_windows(
            tokenizer(text)["input_ids"], tokenizer.bos_token_id, 16
        ):
            with torch.no_grad():
                logits = model(torch.tensor([read])).logits[0, -len(wanted) :]
            total += float(F.cross_entropy(logits.double(), torch.tensor(wanted), reduction="sum"))
    figures = evaluate(folder, None, protocol="rolling", dataset=str(path), seqlen=16)
    assert math.log(figures.perplexity) * figures.tokens == pytest.approx(total, rel=1e-5)


def test_a_cut_document_counts_the_words_that_were_scored(tiny: Maker, text_file: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    windows = windows_of(Protocol("rolling", 16), tokenizer, str(text_file), 3, 512)
    text = tokenizer.decode(stream(tiny("llama"), text_file)[:48])
    assert (windows.targets != UNSCORED).sum() == 48
    assert windows.utf8_bytes == len(text.encode())
    assert windows.words == len(text.split())


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"kind": "sliding"}, "choose one of strided, rolling"),
        ({"seqlen": 1}, "at least 2"),
        ({"seqlen": 16, "context": 16}, "below seqlen 16"),
        ({"context": -1}, "at least 0"),
        ({"kind": "rolling", "context": 4}, "strided protocol"),
    ],
)
def test_protocols_that_make_no_sense(wanted: dict[str, object], says: str):
    with pytest.raises(UsageError, match=says):
        Protocol(**wanted)  # type: ignore[arg-type]


def test_rolling_needs_a_token_to_begin_with(tiny: Maker, text_file: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(DataError, match="strided"):
        windows_of(Protocol("rolling", 16), tokenizer, str(text_file), 3, 512)


def test_text_without_tokens(tiny: Maker, tmp_path: Path):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no tokens"):
        evaluate(tiny("llama"), None, protocol="rolling", dataset=str(path))
