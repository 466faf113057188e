"""The files beside a model's weights that go with it, and those that would mislead.

All that transformers, vLLM and a Hub page read goes with a model: tokenizers of every kind, chat
templates in all their forms, generation and processor settings, licences. What is left out says
something that is not true of the output: other weights, how those are packed or split, adapters, a
training's state, and code of a model whose class is part of transformers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantize.errors import ModelError
from quantize.files.folder import inside, is_file_name, read_json
from quantize.files.needed import TEMPLATES
from quantize.files.weight_files import PICKLES

_MISLEADING = (
    # Of the parent, which the output has in a form of its own.
    "config.json",
    "pq.json",
    "pq-statistics.json",
    # Weights and their indices, in whatever format.
    "*.safetensors",
    "*.safetensors.index*.json",
    *PICKLES,
    "*.bin.index*.json",
    *("*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.npz", "*.npy"),
    *("*.mlmodel", "*.engine", "*.nemo", "*.pdparams", "*.keras", "openvino*"),
    *("*.zip", "*.tar", "*.tar.gz", "*.tgz"),
    # What the parent's files add up to.
    *("*.sig", "*.sha256", "*.md5", "*SUMS", "*SUMS.txt", "checklist.chk"),
    # How weights in other formats are packed, which vLLM reads beside or before config.json.
    "params.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "recipe.yaml",
    # Adapters and the state of a training.
    "adapter_config.json",
    "trainer_state.json",
    "latest",
    "*.py",
)
_NAMES_CODE = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Files whose `auto_map` names code of tokenizers and processors."""
_MODEL_CLASSES = re.compile(r"Auto(Config|Model.*)")
"""What of an `auto_map` is the model's: those that pq converts are part of transformers."""
_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.(\w+)\b", re.MULTILINE)


def side_files(folder: Path) -> list[Path]:
    """The files of a model's folder that an output takes over, sorted by name.

    ModelError for one that may not be read, and for a link that leaves the folder:
    a copy would hold its target.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    kept = {name for name in names if not name.startswith(".") and not _misleads(name)}
    kept |= _code(folder) & set(names)
    found = sorted(folder / name for name in kept)
    templates = folder / TEMPLATES
    if templates.is_dir():
        found += sorted(path for path in templates.glob("*.jinja") if path.is_file())
    for path in found:
        inside(folder, path)
    if closed := [path for path in found if not os.access(path, os.R_OK)]:
        raise ModelError(f"{closed[0]}: may not be read; change its permissions, or remove it")
    return found


def names_in(folder: Path) -> set[str]:
    """Names of all files of a folder as they are recorded, chat templates with their folder's;
    hidden ones are left out."""
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if (folder / TEMPLATES).is_dir():
        there |= {f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).iterdir()}
        there.discard(TEMPLATES)
    return there


def is_recorded_name(name: str) -> bool:
    """Whether a file of an output may be called so: a plain name, or one of a chat template."""
    return is_file_name(name.removeprefix(f"{TEMPLATES}/"))


def without_model_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what names code of the model: its class is part of transformers, and the
    code stays behind."""
    table = config.get("auto_map")
    rest = {k: v for k, v in config.items() if k != "auto_map"}
    if isinstance(table, dict):
        left = {kind: names for kind, names in table.items() if not _MODEL_CLASSES.fullmatch(kind)}
        rest |= {"auto_map": left} if left else {}
    return rest


def _misleads(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _MISLEADING)


def _code(folder: Path) -> set[str]:
    """Names of the code that tokenizers and processors of their own need, imports included."""
    left = [f"{module}.py" for name in _NAMES_CODE for module in _modules_named(folder / name)]
    needed: set[str] = set()
    while left:
        name = left.pop()
        if name in needed or not is_file_name(name) or not (folder / name).is_file():
            continue
        needed.add(name)
        text = inside(folder, folder / name).read_text(encoding="utf-8", errors="replace")
        left += [f"{module}.py" for module in _IMPORT.findall(text)]
    return needed


def _modules_named(path: Path) -> Iterator[str]:
    """Modules of the folder that a file's `auto_map` names: `tokenization_x` of
    `tokenization_x.XTokenizer`; those of other repositories are fetched from there."""
    try:
        facts: dict[str, Any] = read_json(path) if path.is_file() else {}
    except ModelError:  # broken: whoever needs it will say so
        return
    table = facts.get("auto_map")
    for kind, classes in table.items() if isinstance(table, dict) else ():
        if _MODEL_CLASSES.fullmatch(kind):
            continue
        for name in classes if isinstance(classes, list) else [classes]:
            if isinstance(name, str) and "--" not in name and "." in name:
                yield name.rpartition(".")[0]
