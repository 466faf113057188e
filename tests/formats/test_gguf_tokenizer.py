"""tokenizer.json as llama.cpp's metadata: which kinds it takes, and what becomes of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing

from quantize.formats.gguf.tokenizer import tokenizer_metadata

TEXT = ["the cat sat on the mat", "a cat and a hat", "that is that and this is this"] * 3
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def saved(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def bytewise(*steps: Any, **model: Any) -> Tokenizer:
    found = Tokenizer(models.BPE(**model))
    found.pre_tokenizer = steps[0] if len(steps) == 1 else pre.Sequence(list(steps))
    alphabet = pre.ByteLevel.alphabet()
    found.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return found


def pieces() -> Tokenizer:
    """As a SentencePiece model stands in tokenizer.json: bytes to fall back on, merges by score."""
    found = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    found.train_from_iterator(TEXT, trainer)
    told = json.loads(found.to_str())
    told["added_tokens"] = [one for one in told["added_tokens"] if one["id"] < 3]
    found = Tokenizer.from_str(json.dumps(told))
    found.add_tokens([AddedToken("▁▁tool", special=False, normalized=False)])
    found.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    found.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return found


@pytest.mark.parametrize(
    ("name", "steps", "model"),
    [
        ("gpt-2", [pre.ByteLevel(add_prefix_space=False)], {}),
        ("smollm", [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)], {}),
        *(
            (name, [pre.Split(Regex(pattern), "isolated"), level], {"ignore_merges": whole})
            for level in [pre.ByteLevel(add_prefix_space=False, use_regex=False)]
            for name, pattern, whole in (
                ("llama-bpe", LLAMA3, True),
                ("dbrx", LLAMA3, False),
                ("qwen2", QWEN2, False),
            )
        ),
    ],
)
def test_patterns_by_name(tmp_path: Path, name: str, steps: list[Any], model: dict[str, Any]):
    tokenizer = bytewise(*steps, **model)
    size = tokenizer.get_vocab_size()
    told = tokenizer_metadata(saved(tmp_path, tokenizer), {"vocab_size": size + 4})
    assert (told["tokenizer.ggml.model"], told["tokenizer.ggml.pre"]) == ("gpt2", name)
    tokens = told["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert tokens[:size] == [tokenizer.id_to_token(number) for number in range(size)]
    assert tokens[size:] == [f"[PAD{number}]" for number in range(size, size + 4)]
    assert told["tokenizer.ggml.token_type"] == [1] * size + [5] * 4
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert told["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_pieces_have_the_ranks_of_their_merges_for_scores(tmp_path: Path):
    tokenizer = pieces()
    size = tokenizer.get_vocab_size()
    folder = saved(tmp_path, tokenizer, bos_token="<s>", eos_token={"content": "</s>"})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    told = tokenizer_metadata(folder, {"vocab_size": size, "pad_token_id": None})
    assert told["tokenizer.ggml.model"] == "llama"
    assert told["tokenizer.ggml.add_space_prefix"] is True
    assert told["tokenizer.ggml.add_bos_token"] is True
    assert told["tokenizer.ggml.add_eos_token"] is False
    assert told["tokenizer.ggml.bos_token_id"] == 1
    assert told["tokenizer.ggml.eos_token_id"] == 2
    assert "tokenizer.ggml.padding_token_id" not in told
    assert told["tokenizer.chat_template"] == "{{ messages }}"
    kinds, scores = told["tokenizer.ggml.token_type"], told["tokenizer.ggml.scores"]
    tokens = told["tokenizer.ggml.tokens"]
    assert isinstance(kinds, list)
    assert isinstance(scores, list)
    assert isinstance(tokens, list)
    assert kinds[:4] == [2, 3, 3, 6]
    assert kinds.count(6) == 256
    assert (tokens[-1], kinds[-1]) == ("  tool", 4)
    made = {
        "".join(pair): rank
        for rank, pair in enumerate(json.loads(tokenizer.to_str())["model"]["merges"])
    }
    order = sorted(made, key=lambda piece: -scores[tokenizer.token_to_id(piece)])
    assert order == sorted(made, key=lambda piece: made[piece])
    assert max(scores) == 0.0


def test_added_tokens_without_a_row_are_left_out(tmp_path: Path):
    tokenizer = bytewise(pre.ByteLevel(add_prefix_space=False))
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<image>"])
    told = tokenizer_metadata(saved(tmp_path, tokenizer), {"vocab_size": size})
    tokens = told["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert len(tokens) == size
    assert "<image>" not in tokens
    with pytest.raises(
        ValueError, match=f"has a token {size - 1}, and the embedding {size - 1} rows"
    ):
        tokenizer_metadata(tmp_path, {"vocab_size": size - 1})


def test_what_llama_cpp_cannot_run(tmp_path: Path):
    facts = {"vocab_size": 400}
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json"):
        tokenizer_metadata(tmp_path, facts)
    odd = bytewise(pre.Whitespace(), pre.ByteLevel(add_prefix_space=False))
    with pytest.raises(ValueError, match=r"splits text in a way \(Whitespace, ByteLevel\)"):
        tokenizer_metadata(saved(tmp_path, odd), facts)
    lower = bytewise(pre.ByteLevel(add_prefix_space=False))
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"normalizes text \(Lowercase\)"):
        tokenizer_metadata(saved(tmp_path, lower), facts)
    with pytest.raises(ValueError, match="its tokenizer is WordLevel"):
        tokenizer_metadata(saved(tmp_path, Tokenizer(models.WordLevel({"a": 0}, "a"))), facts)
    other = pieces()
    other.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁")])
    with pytest.raises(ValueError, match="has a step NFKC"):
        tokenizer_metadata(saved(tmp_path, other), facts)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no object"):
        tokenizer_metadata(tmp_path, facts)
