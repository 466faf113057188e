"""Which files of a folder hold the weights: those that transformers would load.

The order is that of transformers 5.24 (`_get_resolved_checkpoint_files`): a file that config.json
names as `transformers_weights`, else `model.safetensors`, else the shards that
`model.safetensors.index.json` names. Other safetensors files are not read, whatever is in them:
variants, weights in the names of their authors (`consolidated`), shards of an earlier sharding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.errors import ModelError
from quantize.files.folder import inside, is_file_name, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
NAMED = "transformers_weights"
"""Field of config.json that names the file or index to load."""
NO_FILE = "none, "
"""How a text there begins that only keeps loaders off which do not know pq's own format."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_INDEX_END = ".safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_VARIANT = re.compile(r"model\.(?P<variant>.+?)(?:-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a folder's weights."""

    shards: tuple[str, ...]
    """Their names, sorted: of two that hold one tensor transformers takes the last."""
    index: str | None = None
    """The index that names them; None for a single file."""
    listed: Mapping[str, str] = field(default_factory=dict)
    """Tensor → its shard, as the index says."""
    others: tuple[str, ...] = ()
    """What looks like the same weights and is not read."""

    @property
    def note(self) -> str | None:
        """What is read and what is not, where both could be meant."""
        if not self.others:
            return None
        more = f" and {len(self.others) - 1} more" if len(self.others) > 1 else ""
        return (
            f"reads the weights of {self.index or self.shards[0]}, as transformers does, and not "
            f"those of {self.others[0]}{more}; remove what is not meant"
        )


def weight_files(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """The files that transformers would load. ModelError where there are none, and where what is
    named is no plain name or not there.

    config: what config.json holds.
    """
    named = config.get(NAMED)
    if isinstance(named, str) and named.startswith(NO_FILE):
        named = None
    if named is not None:
        where = f"{folder}/config.json: {NAMED} {str(named)[:80]!r}"
        if not isinstance(named, str) or not is_file_name(named):
            raise ModelError(f"{where} is not a plain file name; refusing to follow it")
        if named.endswith(_INDEX_END):
            return _of_index(folder, named)
        if not named.endswith(".safetensors"):
            raise ModelError(f"{where} is no safetensors file, which alone are read; remove it")
        if not (folder / named).is_file():
            raise ModelError(f"{where} is missing; download it again")
        return WeightFiles((named,))
    if (folder / SINGLE_NAME).is_file():
        return WeightFiles((SINGLE_NAME,), others=_beside_single(folder))
    if (folder / INDEX_NAME).is_file():
        return _of_index(folder, INDEX_NAME)
    raise ModelError(_no_weights(folder))


def require_shard(folder: Path, shard: str, index: str | None = None) -> Path:
    """The path of a shard; ModelError for one that is not there, or lies elsewhere.

    index: what names it.
    """
    if not is_file_name(shard):
        raise ModelError(
            f"{folder / (index or INDEX_NAME)}: shard {shard[:80]!r} is not a plain file name; "
            "refusing to follow it"
        )
    path = folder / shard
    if not path.is_file():
        raise ModelError(f"{path}: shard is missing; download the checkpoint again")
    return inside(folder, path)


def index_problems(files: WeightFiles, held: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Where an index and its shards disagree, a line for each tensor. held: shard → its tensors.

    transformers goes by the shards alone; what pq has written must agree.
    """
    if files.index is None:
        return ()
    places = {name: shard for shard in files.shards for name in held[shard]}
    missing = sorted(name for name in files.listed if name not in places)
    lines = [
        f"{files.listed[name]}: tensor {name} is in the index but not in the shard"
        for name in missing
    ]
    for shard in files.shards:
        lines += [
            f"{shard}: tensor {name} is in the shard but the index places it in "
            f"{files.listed.get(name, 'no file')}"
            for name in sorted(held[shard])
            if files.listed.get(name) != shard
        ]
    return tuple(lines)


def _of_index(folder: Path, index: str) -> WeightFiles:
    weight_map = read_json(inside(folder, folder / index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{folder / index}: weight_map must map tensor names to shard files")
    shards = tuple(sorted(set(weight_map.values())))
    others = sorted(p.name for p in folder.glob("model-*.safetensors") if p.name not in shards)
    stale = tuple(name for name in others if _SHARD.fullmatch(name))
    return WeightFiles(shards, index, weight_map, stale)


def _beside_single(folder: Path) -> tuple[str, ...]:
    """An index that leads elsewhere, and shards."""
    shards = sorted(p.name for p in folder.glob("model-*.safetensors") if _SHARD.fullmatch(p.name))
    if not (folder / INDEX_NAME).is_file():
        return tuple(shards)
    try:
        elsewhere = set(_of_index(folder, INDEX_NAME).shards) != {SINGLE_NAME}
    except ModelError:  # transformers does not look into it
        elsewhere = True
    return (*([INDEX_NAME] if elsewhere else []), *shards)


def _no_weights(folder: Path) -> str:
    """Why there is nothing to read, and what to do."""
    safetensors = sorted(p.name for p in folder.glob("*.safetensors"))
    for name in safetensors:
        if found := _VARIANT.fullmatch(name):
            return (
                f"{folder / name}: is the variant {found['variant']!r}, which transformers loads "
                f"only when it is asked for; rename it to {SINGLE_NAME} (shards: with their index)"
            )
    if shards := [name for name in safetensors if _SHARD.fullmatch(name)]:
        return (
            f"{folder / shards[0]}: is a shard without {INDEX_NAME}, by which shards are found; "
            "download that too"
        )
    if theirs := [name for name in safetensors if name.startswith("consolidated")]:
        return (
            f"{folder / theirs[0]}: holds weights in their authors' own names, which transformers "
            f"does not load; give a folder with {SINGLE_NAME} or {INDEX_NAME}"
        )
    if pickles := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
        return (
            f"{folder / pickles[0]}: pickle weights can run code and are not read; "
            "convert them first (load in transformers and save_pretrained with "
            "safe_serialization=True)"
        )
    if gguf := sorted(folder.glob("*.gguf")):
        return (
            f"{gguf[0]}: GGUF files are quantized already and are not read; give the model "
            "that it was made from, in safetensors"
        )
    return f"{folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}"
