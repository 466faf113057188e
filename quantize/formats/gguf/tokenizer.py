"""tokenizer.json as the metadata that llama.cpp's tokenizers are made of.

Two kinds: byte-level BPE (`gpt2` there), of which llama.cpp knows the patterns that split text by
name, and SentencePiece (`llama` there), which as tokenizer.json is BPE over characters with bytes to
fall back on: the rank of the first merge that makes a piece stands for its score.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.formats.gguf.families import Metadata

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens (`llama_token_type`)."""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SPLITS: Mapping[tuple[str, bool], str] = {
    (f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}", True): "llama-bpe",
    (f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}", False): "dbrx",
    (f"{_CONTRACTIONS}\\p{{N}}{_REST}", False): "qwen2",
    (
        f"[^\\r\\n\\p{{L}}\\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\\r\\n\\p{{L}}\\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        True,
    ): "tekken",
}
"""Pattern, and whether words that are tokens are taken whole → what llama.cpp calls it."""


def tokenizer_metadata(folder: Path, facts: Mapping[str, Any]) -> Metadata:
    """Keys `tokenizer.*` of the tokenizer in a folder; ValueError for one that llama.cpp cannot run.

    facts: config.json with all defaults, whose vocab_size tells how many tokens there must be.
    """
    told, settings = _read(folder / "tokenizer.json"), _settings(folder)
    if told is None:
        raise ValueError(
            "there is no tokenizer.json, of which llama.cpp's tokenizer is made; load the tokenizer "
            "in transformers and save_pretrained it into the model's folder"
        )
    model = told.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(f"its tokenizer is {model.get('type')}; only BPE is written")
    tokens, kinds = _tokens(told, int(facts["vocab_size"]))
    out: Metadata
    if model.get("byte_fallback"):
        out = _sentencepiece(told, tokens, kinds)
    else:
        out = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pattern(told),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
        }
    return out | _special(told, tokens, settings, facts) | _template(folder, settings)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{path.name} cannot be read ({err})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def _settings(folder: Path) -> dict[str, Any]:
    return _read(folder / "tokenizer_config.json") or {}


def _tokens(told: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every token, as many as the embedding has rows."""
    model = told["model"]
    known: dict[int, tuple[str, int]] = {
        number: (text, _NORMAL) for text, number in model["vocab"].items()
    }
    if model.get("byte_fallback"):
        for byte in range(256):
            number = model["vocab"].get(f"<0x{byte:02X}>")
            if number is not None:
                known[number] = (f"<0x{byte:02X}>", _BYTE)
    for added in told.get("added_tokens", ()):
        text, kind = added["content"], _CONTROL if added.get("special") else _USER
        if kind == _USER and model.get("byte_fallback"):
            text = text.replace(_SPACE, " ")
        known[added["id"]] = (text, kind)
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None and model.get("byte_fallback"):
        known[unknown] = (known[unknown][0], _UNKNOWN)
    # Gemma 3 has an added token for images, of which its models of text have no row.
    if (last := max(model["vocab"].values(), default=0)) >= rows:
        raise ValueError(
            f"its tokenizer has a token {last}, and the embedding {rows} rows; give the tokenizer "
            "that belongs to the model"
        )
    pairs = [known.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(rows)]
    return [text for text, _ in pairs], [kind for _, kind in pairs]


def _merges(model: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for merge in model["merges"]:
        yield merge.split(" ") if isinstance(merge, str) else merge


def _steps(part: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the row of those that it consists of."""
    if not isinstance(part, dict):
        return []
    inner = part.get("pretokenizers", part.get("normalizers"))
    return [part] if inner is None else [step for one in inner for step in _steps(one)]


def _pattern(told: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which a byte-level BPE splits text."""
    # NFC changes no text that is composed, as nearly all is; llama.cpp knows none of it.
    if other := [s["type"] for s in _steps(told.get("normalizer")) if s["type"] != "NFC"]:
        raise ValueError(f"its tokenizer normalizes text ({other[0]}), which llama.cpp does not")
    steps = _steps(told.get("pre_tokenizer"))
    whole = bool(told["model"].get("ignore_merges"))
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True) and not whole:
            return "gpt-2"
        kinds = [step["type"] for step in steps]
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            expression = str((steps[0].get("pattern") or {}).get("Regex"))
            if steps[0].get("behavior") == "Isolated" and (expression, whole) in _SPLITS:
                return _SPLITS[expression, whole]
    raise ValueError(
        f"its tokenizer splits text in a way ({', '.join(s['type'] for s in steps) or 'none'}) that "
        f"llama.cpp has no name for among those that pq knows ({', '.join(_names())})"
    )


def _names() -> list[str]:
    return ["gpt-2", "smollm", *_SPLITS.values()]


def _sentencepiece(told: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> Metadata:
    vocab = told["model"]["vocab"]
    made: dict[str, int] = {}
    for rank, pair in enumerate(_merges(told["model"])):
        made.setdefault("".join(pair), rank)
    scores = [0.0] * len(tokens)
    for text, number in vocab.items():
        if kinds[number] == _NORMAL:
            scores[number] = -float(made.get(text, len(made)) + 1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": _prefixes(told),
    }


def _prefixes(told: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normal, steps = _steps(told.get("normalizer")), _steps(told.get("pre_tokenizer"))
    for step in (*normal, *steps):
        known = step["type"] in ("Prepend", "Metaspace")
        replaces = step["type"] == "Replace" and step.get("content") == _SPACE
        splits = step["type"] == "Split" and step.get("pattern") == {"String": " "}
        if not (known or replaces or splits):
            raise ValueError(
                f"its tokenizer has a step {step['type']}, which llama.cpp's SentencePiece has not"
            )
    if any(step["type"] == "Prepend" for step in normal):
        return True
    spaces = [step for step in steps if step["type"] == "Metaspace"]
    return any(step.get("prepend_scheme", "always") != "never" for step in spaces)


def _special(
    told: Mapping[str, Any],
    tokens: Sequence[str],
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Metadata:
    """Special tokens by name, and which of them every text begins and ends with."""
    number = {text: index for index, text in reversed(list(enumerate(tokens)))}
    out: Metadata = {}
    for key, name in (
        ("bos", "bos"),
        ("eos", "eos"),
        ("unk", "unknown"),
        ("pad", "padding"),
        ("sep", "seperator"),  # as llama.cpp writes it
        ("mask", "mask"),
    ):
        text = settings.get(f"{key}_token")
        text = text.get("content") if isinstance(text, dict) else text
        found = number.get(text) if isinstance(text, str) else facts.get(f"{key}_token_id")
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int) and 0 <= found < len(tokens):
            out[f"tokenizer.ggml.{name}_token_id"] = found
    begins, ends = _wrapped(told)
    out["tokenizer.ggml.add_bos_token"] = begins == out.get("tokenizer.ggml.bos_token_id", -1)
    out["tokenizer.ggml.add_eos_token"] = ends == out.get("tokenizer.ggml.eos_token_id", -1)
    return out


def _wrapped(told: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Tokens that the post-processor puts before and behind a text."""
    part = told.get("post_processor") or {}
    every = part.get("processors", [part])
    rules = [one for one in every if one.get("type") == "TemplateProcessing"]
    if not rules:
        return None, None
    ids = {name: found["ids"] for name, found in rules[0].get("special_tokens", {}).items()}
    order = [next(iter(piece.items())) for piece in rules[0]["single"]]

    def at(place: int) -> int | None:
        kind, facts = order[place]
        found = ids.get(facts["id"]) if kind == "SpecialToken" else None
        return found[0] if found else None

    return at(0), at(-1)


def _template(folder: Path, settings: Mapping[str, Any]) -> Metadata:
    """The chat template, from a file of its own or from the tokenizer's settings."""
    path = folder / "chat_template.jinja"
    found = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return {"tokenizer.chat_template": found} if isinstance(found, str) else {}
