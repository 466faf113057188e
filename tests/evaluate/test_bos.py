"""Windows that begin with BOS, in evaluation and in calibration."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize.calibration.tokens import calibration_tokens
from quantize.errors import UsageError
from quantize.evaluate import evaluate
from quantize.evaluate.protocols import UNSCORED, Protocol, windows_of

Maker = Callable[..., Path]


@pytest.fixture
def with_bos(tiny: Maker, tmp_path: Path) -> Path:
    """A model whose tokenizer writes a BOS token itself."""
    folder = tiny("llama")
    copy = shutil.copytree(folder, tmp_path / "bos")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(copy)
    return copy


def stream(folder: Path, text: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return list(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("context", [0, 1, 9])
def test_perplexity_is_that_of_transformers(with_bos: Path, text_file: Path, context: int):
    figures = evaluate(
        with_bos, None, dataset=str(text_file), seqlen=24, context=context, max_windows=4
    )
    model = AutoModelForCausalLM.from_pretrained(with_bos, dtype=torch.float32).eval()
    ids, nll = stream(with_bos, text_file), []
    bos = AutoTokenizer.from_pretrained(with_bos).bos_token_id
    for k in range(4):
        window = [bos, *ids[k * (23 - context) :][:23]]
        with torch.no_grad():
            log_p = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        nll += [-float(log_p[i - 1, window[i]]) for i in range(1 + (context if k else 0), 24)]
    assert figures.tokens == len(nll)
    assert figures.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert figures.protocol == "strided-24" + (f"-context-{context}" if context else "") + "-bos"


@pytest.mark.parametrize("context", [0, 1, 20])
def test_every_token_is_predicted_once(with_bos: Path, text_file: Path, context: int):
    tokenizer = AutoTokenizer.from_pretrained(with_bos)
    protocol = Protocol("strided", 32, context, bos=True)
    windows = windows_of(protocol, tokenizer, str(text_file), 6, 512)
    assert (windows.inputs[:, 0] == tokenizer.bos_token_id).all()
    scored = [int(token) for row in windows.targets for token in row if int(token) != UNSCORED]
    assert scored == stream(with_bos, text_file)[: 31 + 5 * (31 - context)]


def test_the_choice(tiny: Maker, with_bos: Path, text_file: Path, caplog: pytest.LogCaptureFixture):
    plain, adding = (AutoTokenizer.from_pretrained(folder) for folder in (tiny("llama"), with_bos))
    strided = Protocol("strided", 32)
    assert strided.with_bos(plain, "auto").name == "strided-32"
    assert strided.with_bos(plain, "always").name == "strided-32-bos"
    assert strided.with_bos(plain, "never").name == "strided-32"
    assert not caplog.messages
    assert strided.with_bos(adding, "never").name == "strided-32"
    assert ["begins texts with BOS" in message for message in caplog.messages] == [True]
    assert Protocol("rolling", 32).with_bos(adding, "auto").name == "rolling-32"
    with pytest.raises(UsageError, match="strided protocol"):
        Protocol("rolling", 32).with_bos(adding, "always")
    with pytest.raises(UsageError, match=r"below seqlen - 1 \(31\)"):
        Protocol("strided", 32, 31).with_bos(adding, "auto")
    plain.bos_token = None
    with pytest.raises(UsageError, match="no BOS token; choose auto or never"):
        strided.with_bos(plain, "always")


def test_calibration_windows(tiny: Maker, with_bos: Path, text_file: Path):
    plain, adding = (AutoTokenizer.from_pretrained(folder) for folder in (tiny("llama"), with_bos))
    how = {"dataset": str(text_file), "nsamples": 3, "seqlen": 16, "seed": 0}
    ids = stream(with_bos, text_file)
    unmarked = calibration_tokens(plain, **how)
    assert unmarked.tokens.flatten().tolist() == ids[:48]
    assert calibration_tokens(adding, **how, bos="never").sha256 == unmarked.sha256
    for tokens in (
        calibration_tokens(adding, **how),
        calibration_tokens(plain, **how, bos="always"),
    ):
        assert tokens.origin["bos"] is True
        expected = [[plain.bos_token_id, *ids[at : at + 15]] for at in (0, 15, 30)]
        assert tokens.tokens.tolist() == expected


def test_the_bos_of_a_chat_is_not_doubled(with_bos: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(with_bos)
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}"
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"text": "words of a chat " * 5}) for _ in range(4)))
    tokens = calibration_tokens(
        tokenizer, dataset=str(path), nsamples=3, seqlen=16, seed=0, chat_template=True
    ).tokens
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert tokens[0, 1] != tokenizer.bos_token_id
