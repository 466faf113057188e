"""The tokenizer beside a model's weights, and why there is none that works."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.errors import DataError
from quantize.files.checkpoint import read_json
from quantize.model.transformers_api import read_tokenizer

_FAST = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEKKEN = "tekken.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
_TIKTOKEN = ("tiktoken.model", "*.tiktoken")
_BPE = ("vocab.json", "merges.txt")
_WORDS = ("vocab.txt", "vocab.model", "*_vocab*.txt")
_VOCABULARIES = (_FAST, _TEKKEN, *_SENTENCEPIECE, *_TIKTOKEN, *_BPE, *_WORDS)
"""Files that vocabularies are kept in."""
_BYTES = 256
"""Tokens without which nothing can be written that has no vocabulary file: one for each byte."""
_POINTER = b"version https://git-lfs.github.com/"
_BESIDE = "put tokenizer.json and tokenizer_config.json of the model beside the weights"
_TEMPLATE = "chat_template.json"
"""Where processors of older releases keep the template that their tokenizer has not."""
_OR_FAST = "or put the tokenizer.json that belongs to it beside the weights"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that stands beside the weights; DataError, with the cause and the cure, when
    there is none that works."""
    try:
        tokenizer = read_tokenizer(folder)
    # The tokenizers library raises plain Exception for a broken file, transformers half a dozen
    # classes, and what panics in Rust is no Exception.
    except BaseException as err:
        if not isinstance(err, Exception) and type(err).__name__ != "PanicException":
            raise
        raise DataError(f"{folder}: no usable tokenizer: {_cause(folder, err)}") from None
    # transformers makes tokenizers of some models from nothing, which know no word.
    if not _present(folder, _VOCABULARIES) and len(tokenizer) < _BYTES:
        raise DataError(f"{folder}: no usable tokenizer: {_none(folder)}")
    if not getattr(tokenizer, "chat_template", None) and (folder / _TEMPLATE).is_file():
        told = read_json(folder / _TEMPLATE).get("chat_template")
        tokenizer.chat_template = told if isinstance(told, str) else None
    return tokenizer


def _cause(folder: Path, err: BaseException) -> str:
    """What is wrong with the files of a tokenizer that cannot be read, and what to do."""
    reason = (str(err).strip().splitlines() or [type(err).__name__])[0][:300]
    for name in _present(folder, (*_VOCABULARIES, _CONFIG)):
        if _begins(folder / name, _POINTER):
            return f"{name} is a Git LFS pointer and not the file; fetch it with 'git lfs pull'"
    fast = _present(folder, (_FAST,))
    if "auto_map" in _config(folder) and ("custom code" in reason or not fast):
        return (
            f"the tokenizer needs code of its own (auto_map in {_CONFIG}), which pq does not run; "
            "have transformers load it with that code and save it, and put the tokenizer.json that "
            "it writes beside the weights, without auto_map"
        )
    if fast:
        return f"{_FAST} cannot be read ({reason}); fetch it anew, with its {_CONFIG}"
    if _present(folder, (_TEKKEN,)):
        if missing := _missing("mistral_common"):
            return f"{_TEKKEN} is read by mistral-common: {_install(missing)}, {_OR_FAST}"
        return f"{_TEKKEN} cannot be read ({reason}); fetch it anew, {_OR_FAST}"
    if found := _present(folder, (*_SENTENCEPIECE, *_TIKTOKEN)):
        return _converted(folder, found[0], reason)
    if found := _present(folder, _BPE):
        absent = [name for name in _BPE if name not in found]
        if absent:
            return f"{found[0]} is there without {absent[0]}: fetch that too, {_OR_FAST}"
    if _present(folder, _VOCABULARIES):
        return f"{reason}; {_BESIDE}"
    return _none(folder)


def _none(folder: Path) -> str:
    versioned = sorted(path.name for path in folder.glob("tokenizer*.model.v*"))
    if versioned:
        return f"{versioned[0]} is not looked for under this name: copy it to tokenizer.model"
    return f"no {_FAST}, {_SENTENCEPIECE[0]} or {' with '.join(_BPE)} there; {_BESIDE}"


def _converted(folder: Path, name: str, reason: str) -> str:
    """For vocabularies that transformers converts with a library that may not be there."""
    by_lines = bool(re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", _start(folder / name)))
    if missing := _missing(*(("tiktoken",) if by_lines else ("sentencepiece", "google.protobuf"))):
        return f"to convert {name} transformers needs more: {_install(missing)}, {_OR_FAST}"
    return f"{name} cannot be read ({reason}); fetch it anew, {_OR_FAST}"


def _present(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Names of files, in the order of the patterns."""
    return [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]


def _missing(*modules: str) -> list[str]:
    return [name for name in modules if not _installed(name)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it is part of
        return False


def _install(modules: Sequence[str]) -> str:
    packages = (name.removeprefix("google.").replace("_", "-") for name in modules)
    return f"pip install {' '.join(packages)}"


def _begins(path: Path, start: bytes) -> bool:
    return _start(path).startswith(start)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / _CONFIG)
    except Exception:  # its own reader told of it
        return {}
