"""Windows that begin with BOS, in evaluation, in calibration and in tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES, with_added_bos
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from quantize.calibration.bos import adds_bos, bos_of
from quantize.calibration.fit import context_of, said_once, warn_of_length
from quantize.calibration.tokens import calibration_tokens
from quantize.errors import UsageError
from quantize.evaluation import evaluate
from quantize.evaluation.protocols import UNSCORED, Protocol, windows_of

Maker = Callable[..., Path]


@pytest.fixture
def with_bos(tiny: Maker, tmp_path: Path) -> Path:
    """A model whose tokenizer writes a BOS token itself."""
    return with_added_bos(tiny("llama"), tmp_path / "bos")


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


def test_the_choice(tiny: Maker, with_bos: Path):
    plain, adding = (AutoTokenizer.from_pretrained(folder) for folder in (tiny("llama"), with_bos))
    strided = Protocol("strided", 32)
    assert strided.with_bos(plain, "auto").name == "strided-32"
    assert strided.with_bos(plain, "always").name == "strided-32-bos"
    assert strided.with_bos(plain, "never").name == "strided-32"
    assert strided.with_bos(adding, "never").name == "strided-32"
    assert Protocol("rolling", 32).with_bos(adding, "auto").name == "rolling-32"
    with pytest.raises(UsageError, match="strided protocol"):
        Protocol("rolling", 32).with_bos(adding, "always")
    with pytest.raises(UsageError, match="strided protocol"):
        Protocol("rolling", 32, bos=True)
    with pytest.raises(UsageError, match=r"below seqlen - 1 \(31\)"):
        Protocol("strided", 32, 31).with_bos(adding, "auto")
    plain.bos_token = None
    with pytest.raises(UsageError, match="no BOS token; choose auto or never"):
        strided.with_bos(plain, "always")


CHARACTERS = sorted({character for text in SENTENCES for character in text if character != " "})
VOCAB = {
    token: i
    for i, token in enumerate(
        ["<unk>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<|endoftext|>", "\u2581", *CHARACTERS]
    )
}


def of_llama_3() -> PreTrainedTokenizerFast:
    """BOS by the post-processor in tokenizer.json; nothing in tokenizer_config.json says so."""
    backend = Tokenizer(models.BPE(VOCAB, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def of_none_that_adds() -> PreTrainedTokenizerFast:
    """A BOS token that is there, and that no text gets."""
    made = of_llama_3()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return made


def of_bert() -> PreTrainedTokenizerFast:
    """A token in front of each text that is not the BOS token."""
    made = of_llama_3()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 5)]
    )
    return made


KINDS: dict[str, tuple[Callable[[], Any], int | None, int | None]] = {
    "Llama 3": (of_llama_3, 1, 1),
    "Llama 2": (lambda: LlamaTokenizer(vocab=VOCAB, merges=[], add_bos_token=True), 1, 1),
    "Llama 2, off": (lambda: LlamaTokenizer(vocab=VOCAB, merges=[], add_bos_token=False), 1, None),
    "Gemma": (lambda: GemmaTokenizer(vocab=VOCAB, merges=[], add_bos_token=True), 3, 3),
    "Qwen": (lambda: Qwen2Tokenizer(vocab=VOCAB, merges=[]), None, None),
    "not added": (of_none_that_adds, 1, None),
    "another in front": (of_bert, 1, None),
}
"""Name → tokenizer, its BOS token, the one that it writes before a text."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer(kind: str, tmp_path: Path, text_file: Path):
    make, bos, added = KINDS[kind]
    make().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos_token_id == bos
    assert adds_bos(tokenizer) is (added is not None)
    assert bos_of(tokenizer, "auto") == added
    assert bos_of(tokenizer, "never") is None
    ids = stream(tmp_path, text_file)
    how = {"dataset": str(text_file), "nsamples": 3, "seqlen": 16, "seed": 0}
    protocol = Protocol("strided", 16).with_bos(tokenizer, "auto")
    evaluated = windows_of(protocol, tokenizer, str(text_file), 3, len(VOCAB) + 9)
    calibrated = calibration_tokens(tokenizer, **how)
    front, own = ([], 16) if added is None else ([added], 15)
    expected = [[*front, *ids[at : at + own]] for at in range(0, 3 * own, own)]
    assert evaluated.inputs.tolist() == calibrated.tokens.tolist() == expected
    assert protocol.name == ("strided-16" if added is None else "strided-16-bos")
    assert calibrated.bos == added
    assert calibrated.origin["bos"] is (added is not None)
    assert calibrated.origin["bos_token_id"] == added
    if bos is None:
        with pytest.raises(UsageError, match="no BOS token"):
            calibration_tokens(tokenizer, **how, bos="always")
    else:
        always = calibration_tokens(tokenizer, **how, bos="always").tokens
        assert always.tolist() == [[bos, *ids[at : at + 15]] for at in (0, 15, 30)]


def test_no_window_predicts_its_bos(with_bos: Path, text_file: Path):
    """The target of each position is the token behind it; the last position has none, and BOS,
    behind nothing, is no position's target."""
    tokenizer = AutoTokenizer.from_pretrained(with_bos)
    windows = windows_of(Protocol("strided", 24, bos=True), tokenizer, str(text_file), 5, 512)
    assert windows.inputs.shape == (5, 24)
    assert torch.equal(windows.targets[:, :-1], windows.inputs[:, 1:])
    assert (windows.targets[:, -1] == UNSCORED).all()
    assert not (windows.targets == tokenizer.bos_token_id).any()


def test_warnings_are_said_once(
    tiny: Maker, with_bos: Path, text_file: Path, caplog: pytest.LogCaptureFixture
):
    def said(folder: Path, seqlen: int, **more: Any) -> list[str]:
        caplog.clear()
        evaluate(folder, None, dataset=str(text_file), seqlen=seqlen, max_windows=1, **more)
        return caplog.messages

    assert said(with_bos, 256) == []
    assert said(tiny("llama"), 256, bos="never") == []
    (line,) = said(with_bos, 32, bos="never")
    assert "tokenizer begins texts with BOS" in line
    (line,) = said(with_bos, 257)
    assert "257 tokens" in line
    assert "context of 256 (max_position_embeddings)" in line
    with said_once():
        assert len(said(with_bos, 257, bos="never")) == 2
        assert said(with_bos, 257, bos="never") == []
    assert len(said(with_bos, 257, bos="never")) == 2


def test_the_context_of_a_text_decoder_inside_another_model(caplog: pytest.LogCaptureFixture):
    assert context_of({"max_position_embeddings": 8}) == 8
    assert context_of({"text_config": {"max_position_embeddings": 9}}) == 9
    assert context_of({"text_config": None}) is None
    assert context_of({"max_position_embeddings": None}) is None
    nested = {"text_config": {"max_position_embeddings": 9}, "vision_config": {}}
    warn_of_length(9, nested)
    assert not caplog.messages
    warn_of_length(10, nested)
    assert len(caplog.messages) == 1


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


def test_figures_name_the_token(tiny: Maker, with_bos: Path, text_file: Path):
    how = {"dataset": str(text_file), "seqlen": 24, "max_windows": 1}
    assert evaluate(with_bos, None, **how).bos_token_id == 0
    assert evaluate(tiny("llama"), None, **how).bos_token_id is None
    assert evaluate(tiny("llama"), None, **how, bos="always").bos_token_id == 0
