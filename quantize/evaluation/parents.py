"""The parent's run, kept on the disk: the hidden states that leave its last block.

A gate measures many models against one parent on one text. What the parent makes of the text takes
as long as what a model makes of it, and does not change. Its hidden states are kept, not its
logits, which take vocabulary / channels times the room (thirty times as much in a Llama 3 8B); the
final norm and the head run anew, so that logits are the same to the last bit.

The key is a SHA-256 over all that hidden states follow from: the parent's weights and config.json,
its tokenizer's files, the tokens of the text, the protocol, dtype, device, and the releases of what
computes. The tensors carry a hash of their own: what was damaged on the disk is computed anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import OutputError
from quantize.evaluation.protocols import Protocol, Windows
from quantize.files import cache
from quantize.files.hashing import sha256_file
from quantize.files.memo import Memo, digest
from quantize.model.dequantized import open_source
from quantize.model.linear import Numerics
from quantize.parallel.agreement import processor
from quantize.version import __version__

log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers")
_TEXT = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template")
"""How the names of files begin that decide on tokens."""
Visits = dict[int, tuple[int, int]]
"""Block → visits of routed experts, tokens."""


def parents_folder() -> Path:
    """Where the runs of parents are kept."""
    return cache.cache_folder("parents")


@dataclass
class ParentCache:
    """Hidden states of parents in one folder."""

    folder: Path = field(default_factory=parents_folder)
    limit: int = cache.LIMIT_BYTES
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    used: int = 0
    """Runs over a group of windows that were found."""
    made: int = 0
    """Those that were not."""
    _hashes: dict[str, str] = field(default_factory=dict)

    def of(
        self,
        parent: Path,
        windows: Windows,
        protocol: Protocol,
        dtype: torch.dtype,
        device: torch.device,
        numerics: Numerics,
    ) -> HiddenStates:
        """What is kept of one parent on one text."""
        facts = {
            "parent": self._hash_of(parent),
            "text": windows.sha256,
            "protocol": protocol.name,
            "dtype": str(dtype),
            "numerics": numerics,
            "device": [device.type, processor(device)],
            "pq": __version__,
            "code": _code(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        }
        return HiddenStates(self, facts, device)

    def _hash_of(self, parent: Path) -> str:
        """SHA-256 over the files that decide; read once for all models of one command."""
        name = str(parent.resolve())
        if name not in self._hashes:
            source = open_source(parent)
            names = {*source.shards, "config.json"}
            names |= {path.name for path in parent.iterdir() if path.name.startswith(_TEXT)}
            found = {}
            for done, file in enumerate(sorted(names)):
                self.progress("hashing the parent", done, len(names))
                if (parent / file).is_file():
                    found[file] = sha256_file(parent / file)
            text = json.dumps(found, sort_keys=True)
            self._hashes[name] = hashlib.sha256(text.encode()).hexdigest()
        return self._hashes[name]


@dataclass
class HiddenStates:
    """What is kept of one parent on one text, one entry for each group of windows."""

    cache: ParentCache
    facts: Mapping[str, Any]
    device: torch.device

    def recall(self, inputs: Tensor) -> tuple[MutableSequence[Tensor], Visits] | None:
        """Hidden states [B, T, D] of batches of windows, as they left the last block, and who
        visited experts; None where they are not kept or not whole."""
        memo, key = self._at(inputs)
        found = memo.recall(key)
        if found is None:
            return None
        tensors, facts = found
        batches = [tensors[name] for name in sorted(tensors, key=int)]
        if facts.get("digest") != _digest(batches):
            log.warning("%s: a kept run of the parent is damaged; it runs again", memo.folder)
            return None
        self.cache.used += 1
        cache.touch(self.cache.folder / f"{key}.safetensors")
        visits = {index: (visits, tokens) for index, visits, tokens in facts["visits"]}
        return [batch.to(self.device) for batch in batches], visits

    def keep(self, inputs: Tensor, batches: Sequence[Tensor], visits: Visits) -> None:
        """Keep them; a disk that is full or may not be written is told of, and measuring goes on."""
        self.cache.made += 1
        memo, key = self._at(inputs)
        tensors = {str(i): batch.cpu() for i, batch in enumerate(batches)}
        if sum(tensor.nbytes for tensor in tensors.values()) > self.cache.limit:
            return
        facts = {
            "digest": _digest(list(tensors.values())),
            "visits": [[index, *counts] for index, counts in visits.items()],
        }
        try:
            memo.keep(key, tensors, facts)
            cache.shrink(self.cache.folder, self.cache.limit)
        except OutputError as err:
            log.warning("the parent's run is not kept: %s", err)

    def _at(self, inputs: Tensor) -> tuple[Memo, str]:
        return Memo(self.cache.folder), digest(self.facts, [inputs])


def _digest(batches: Sequence[Tensor]) -> str:
    return digest({}, batches)


def _code() -> str:
    """SHA-256 over pq's own source: a working tree has one version for many states of it."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
