from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quantize.calibration.tokens import TokenSet, calibration_tokens, check_vocab, evaluation_tokens
from quantize.errors import DataError
from quantize.model.tokenizer import load_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared"
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
ALPHABET = [chr(code) for code in range(32, 127)] + ["\n", "é"]


def byte_tokenizer(
    *, bos: bool = True, eos: bool = True, chat: bool = False
) -> PreTrainedTokenizerFast:
    """One token a byte; 0 is BOS, 1 is EOS; a call with special tokens would put BOS in front."""
    vocab = {"<s>": 0, "</s>": 1} | {
        c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    special = ({"bos_token": "<s>"} if bos else {}) | ({"eos_token": "</s>"} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=8, **special)
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


TOKENIZER = byte_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False, verbose=False)["input_ids"]


def calibrate(
    dataset: object, nsamples: int = 2, seqlen: int = 4, seed: int = 0, **more: object
) -> TokenSet:
    tokenizer = more.pop("tokenizer", TOKENIZER)
    more.setdefault("bos", "never")  # tests/evaluation/test_bos.py has windows with BOS
    return calibration_tokens(
        tokenizer, dataset=str(dataset), nsamples=nsamples, seqlen=seqlen, seed=seed, **more
    )


def write_jsonl(path: Path, rows: list[object], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: row}) + "\n" for row in rows), encoding="utf-8")
    return path


def message(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


COMMIT = "beef" * 10


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that every set of the stand-in for `datasets` holds."""
    rows: list[str] = []
    module = ModuleType("datasets")
    module.load_dataset = lambda *_, **__: ({"text": row} for row in rows)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("quantize.files.hub.dataset_commit", lambda name, revision: COMMIT)
    return rows


# ---- one text ----


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(ALPHABET, min_size=1).filter(str.strip), seqlen=st.integers(1, 9), data=st.data()
)
def test_windows_reproduce_the_stream(
    tmp_path: Path, text: str, seqlen: int, data: st.DataObject
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())
    stream = ids(text)
    whole = len(stream) // seqlen
    if not whole:
        assert "lower seqlen" in message(
            lambda: evaluation_tokens(TOKENIZER, dataset=str(file), seqlen=seqlen)
        )
        return
    evaluated = evaluation_tokens(TOKENIZER, dataset=str(file), seqlen=seqlen)
    assert evaluated.tokens.shape == (whole, seqlen)
    assert evaluated.tokens.dtype == torch.int64
    assert evaluated.tokens.flatten().tolist() == stream[: whole * seqlen]
    count = data.draw(st.integers(1, whole))
    assert (
        calibrate(file, count, seqlen, seed=count).tokens.flatten().tolist()
        == stream[: count * seqlen]
    )
    limited = evaluation_tokens(TOKENIZER, dataset=str(file), seqlen=seqlen, max_windows=count)
    assert torch.equal(limited.tokens, evaluated.tokens[:count])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("abcd", min_size=12, max_size=12), position=st.integers(0, 11))
def test_sha256_follows_every_token(tmp_path: Path, text: str, position: int) -> None:
    other = text[:position] + "x" + text[position + 1 :]
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(other)
    first, second = calibrate(tmp_path / "a.txt", 3), calibrate(tmp_path / "b.txt", 3)
    little_endian = b"".join(token.to_bytes(8, "little", signed=True) for token in ids(text))
    assert first.sha256 == hashlib.sha256(little_endian).hexdigest()
    assert first.sha256 != second.sha256


def test_text_file_origin_has_the_name_and_no_path(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\ntwo three".encode())
    result = calibrate(file, 2, 5, seed=7)
    assert result.tokens.flatten().tolist() == ids("one\r\ntwo t")
    assert result.origin == {
        "dataset": "a.txt",
        "split": None,
        "licence": None,
        "text_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "nsamples": 2,
        "seqlen": 5,
        "seed": 7,
        "packing": "stream",
        "chat_template": False,
        "bos": False,
        "bos_token_id": None,
    }
    assert str(tmp_path) not in json.dumps(result.origin) + result.source


def test_long_text_gives_no_length_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("word " * 100)
    calibrate(tmp_path / "a.txt", tokenizer=byte_tokenizer(), bos="auto")
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_truncation_stored_in_the_tokenizer_is_ignored(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    (tmp_path / "a.txt").write_text("0123456789")
    assert evaluation_tokens(
        tokenizer, dataset=str(tmp_path / "a.txt"), seqlen=10
    ).tokens.shape == (1, 10)


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789")
    text = message(lambda: calibrate(tmp_path / "a.txt", 3, 4))
    assert "10 tokens, 2 windows of 4, and 3 are wanted" in text
    assert "lower nsamples to 2" in text


# ---- documents ----


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.text("abc ", min_size=1, max_size=6), min_size=1, max_size=8),
    seed=st.integers(0, 9),
)
def test_packing_keeps_every_document_once(tmp_path: Path, rows: list[str], seed: int) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    total = sum(len(row) + 1 for row in rows)
    tokens = calibrate(file, 1, total, seed).tokens.flatten().tolist()
    documents: list[list[int]] = [[]]
    for token in tokens:
        if token == TOKENIZER.eos_token_id:
            documents.append([])
        else:
            documents[-1].append(token)
    assert documents.pop() == []
    assert sorted(documents) == sorted(ids(row) for row in rows)
    assert calibrate(file, 1, total, seed).tokens.flatten().tolist() == tokens


def test_seed_changes_the_order_of_documents(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [chr(ord("a") + i) * 3 for i in range(20)])
    orders = {calibrate(file, 20, 4, seed).sha256 for seed in range(8)}
    assert len(orders) == 8
    assert calibrate(file).origin["packing"] == "packed"


def test_without_eos_token_documents_touch(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["aaaa", "aaaa"])
    tokens = calibrate(file, 2, 4, tokenizer=byte_tokenizer(eos=False)).tokens
    assert tokens.flatten().tolist() == ids("a" * 8)


def test_parquet_and_jsonl_agree_and_take_a_text_field(tmp_path: Path) -> None:
    rows = ["first row", "second", "", "third and last"]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows, field="body")
    parquet.write_table(pa.table({"id": [1, 2, 3, 4], "body": rows}), tmp_path / "a.parquet")
    first, second = (
        calibrate(file, 3, 8, text_field="body") for file in (jsonl, tmp_path / "a.parquet")
    )
    assert torch.equal(first.tokens, second.tokens)
    joined = evaluation_tokens(TOKENIZER, dataset=str(jsonl), seqlen=5, text_field="body")
    stream = ids("\n\n".join(rows))
    assert joined.tokens.flatten().tolist() == stream[: len(stream) // 5 * 5]
    assert joined.origin["packing"] == "stream"


def test_chat_rows_are_rendered_and_plain_rows_become_a_user_turn(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    rendered = ["<|user|>hi</s><|assistant|>yo</s>", "<|user|>plain</s>"]
    file = write_jsonl(tmp_path / "a.jsonl", [chat, "plain"])
    length = sum(len(ids(text)) for text in rendered)
    result = calibrate(file, 1, length, tokenizer=byte_tokenizer(chat=True), chat_template=True)
    # The template ends each turn with EOS; packing adds no second one.
    assert result.tokens[0].tolist() in (
        ids(rendered[0] + rendered[1]),
        ids(rendered[1] + rendered[0]),
    )
    assert result.origin["chat_template"] is True
    assert "chat_template off" in message(lambda: calibrate(file, chat_template=True))


def test_refusal_of_a_chat_template_names_the_row(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    text = message(
        lambda: calibrate(
            write_jsonl(tmp_path / "a.jsonl", ["hello"]), tokenizer=tokenizer, chat_template=True
        )
    )
    assert "'hello'" in text
    assert "roles must alternate" in text


# ---- limits ----


@pytest.mark.parametrize(
    ("nsamples", "seqlen"), [(0, 4), (1, 0), (-1, 4), (1, 2**20 + 1), (2**12, 2**20)]
)
def test_absurd_sizes(nsamples: int, seqlen: int) -> None:
    assert "seqlen" in message(lambda: calibrate("builtin", nsamples, seqlen))
    assert "seqlen" in message(
        lambda: evaluation_tokens(TOKENIZER, dataset="builtin", seqlen=seqlen, max_windows=nsamples)
    )


def test_check_vocab_names_the_token() -> None:
    tokens = torch.tensor([[0, 9], [7, 3]])
    check_vocab(tokens, 10)
    assert "token id 9 (window 0, position 1)" in message(lambda: check_vocab(tokens, 9))
    assert "token id -1" in message(lambda: check_vocab(tokens - 1, 9))


# ---- built-in set ----


def test_builtin_uses_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("quantize.calibration.pydocs")
    module.text = {"train": "train text here", "heldout": "held out"}.__getitem__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quantize.calibration.pydocs", module)
    monkeypatch.setattr("quantize.calibration.pydocs", module, raising=False)
    result = calibrate("builtin", 100, 4)
    assert result.tokens.flatten().tolist() == ids("train text h")
    assert result.origin["nsamples"] == 3
    heldout = evaluation_tokens(TOKENIZER, dataset="builtin", seqlen=4)
    assert heldout.tokens.flatten().tolist() == ids("held out")
    assert heldout.origin["split"] == "heldout"
    assert "lower seqlen" in message(lambda: calibrate("builtin", 1, 16))
    assert "chat_template off" in message(lambda: calibrate("builtin", chat_template=True))


# ---- Hub sets ----


def test_wikitext2_is_one_text(hub: list[str]) -> None:
    hub += ["", " = A = \n", "body body\n"]
    stream = ids("\n\n = A = \n\n\nbody body\n")
    result = evaluation_tokens(TOKENIZER, dataset="wikitext2", seqlen=4)
    assert result.tokens.flatten().tolist() == stream[: len(stream) // 4 * 4]
    calibration = calibrate("wikitext2", 2, 4)
    assert calibration.tokens.flatten().tolist() == stream[:8]
    assert calibration.origin["packing"] == "stream"


def test_streamed_sets_are_read_as_far_as_needed(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.calibration.tokens._POOL_CHARACTERS", 100)
    hub += [f"{i:05d}" * 2 for i in range(1000)]
    first, second = (calibrate("c4", 2, 8, seed=seed) for seed in (0, 1))
    assert first.sha256 != second.sha256
    # 16 characters a token × 16 tokens = 256 characters
    assert (first.origin["rows"], second.origin["rows"]) == (26, 26)
    limited = evaluation_tokens(TOKENIZER, dataset="c4", seqlen=4, max_windows=1)
    assert limited.tokens.tolist() == [ids("0000")]
    assert "limit the number of windows" in message(
        lambda: evaluation_tokens(TOKENIZER, dataset="c4", seqlen=4)
    )


# ---- the yardstick ----


@pytest.mark.shared
def test_first_windows_of_the_shared_text() -> None:
    text, model = SHARED / "text" / "c4-calibration.txt", SHARED / "models" / "yardstick"
    for path in (text, model):
        if not path.exists():
            pytest.skip(f"{path.name} is not beside the checkout")
    tokenizer = AutoTokenizer.from_pretrained(model)
    result = calibration_tokens(tokenizer, dataset=str(text), nsamples=128, seqlen=512, seed=0)
    # Straight from the tokenizers library, without transformers.
    direct = Tokenizer.from_file(str(model / "tokenizer.json")).encode(
        text.read_text(encoding="utf-8"), add_special_tokens=False
    )
    assert result.tokens.shape == (128, 512)
    assert result.tokens.flatten().tolist() == direct.ids[: 128 * 512]
    check_vocab(result.tokens, len(tokenizer))


def test_the_first_windows_are_those_of_the_whole_text(tiny: Callable[..., Path], tmp_path: Path):
    """Only the beginning of a long text is encoded; more of it where characters give few tokens."""
    path = tmp_path / "long.txt"
    path.write_text("".join(f"word{i} " + " " * (i % 40) + "x" * (i % 7) for i in range(6000)))
    tokenizer = load_tokenizer(tiny("llama"))
    whole = evaluation_tokens(tokenizer, dataset=str(path), seqlen=32).tokens
    for count, overlap in ((1, 0), (3, 0), (40, 0), (7, 20)):
        part = evaluation_tokens(
            tokenizer, dataset=str(path), seqlen=32, max_windows=count, overlap=overlap
        ).tokens
        stream = whole.flatten()
        expected = torch.stack([stream[i * (32 - overlap) :][:32] for i in range(count)])
        assert torch.equal(part, expected)
