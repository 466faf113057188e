"""Stored tensors that a model has no place for: modules of their own, and what is left over.

transformers loads a model without them, with a line in its report at most. Modules beside the
decoder, such as the heads that predict several tokens (MTP: `mtp.*`, or in DeepSeek's checkpoints a
layer behind the last), are of use to engines: they go with the model as they are. What stands within
the decoder cannot, as stages change what is around it, and what is computed anew need not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_OTHER_HEADS = (
    *("score", "classifier", "classification_head", "qa_outputs", "summary"),
    *("v_head", "value_head", "reward_head", "regression_head"),
)
"""Modules that classes for other tasks than text have in the place of its head."""
_MTP = re.compile(r"eh_proj|enorm|hnorm|shared_head|mtp|nextn")
"""Parts of a layer that predicts further tokens and of no other."""
_MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Fields of config.json with the number of such layers."""
_SHOWN = 3


@dataclass(frozen=True)
class Place:
    """What is around a tensor that the model has no place for."""

    blocks: str
    """The list of the decoder's layers."""
    n_blocks: int
    prefix: str
    """What names of the whole model have before those of its part without a head."""
    modules: Collection[str]

    def root(self, name: str) -> str | None:
        """The outermost module on the way to a tensor that the model does not have, by the model's
        names; None for a tensor of a module that it has."""
        best, most = None, -1
        bare = name.removeprefix(f"{self.prefix}.")
        for candidate in dict.fromkeys((name, f"{self.prefix}.{bare}", bare)):
            levels = candidate.split(".")[:-1] or [candidate]
            known = 0
            while known < len(levels) and ".".join(levels[: known + 1]) in self.modules:
                known += 1
            # The prefix alone is around everything.
            place = 0 if ".".join(levels[:known]) == self.prefix else known
            if place > most:
                best = None if known == len(levels) else ".".join(levels[: known + 1])
                most = place
        return best

    def layer(self, root: str) -> int | None:
        """Number of the decoder's layer that a module is of, or is; None where it is of none."""
        levels = root.removeprefix(f"{self.blocks}.").split(".")
        inside = root.startswith(f"{self.blocks}.") and levels[0].isdecimal()
        return int(levels[0]) if inside else None


@dataclass(frozen=True)
class Leftovers:
    """Stored names of what a model has no place for."""

    carried: Mapping[str, tuple[str, ...]]
    """Module that goes with the model as it is → its tensors."""
    ignored: tuple[str, ...]

    @property
    def carried_names(self) -> tuple[str, ...]:
        """All tensors that go with the model."""
        return tuple(name for names in self.carried.values() for name in names)

    def lines(self) -> list[str]:
        """What became of them, a line each."""
        out = []
        if self.ignored:
            out.append(
                f"{_tensors(self.ignored)} that the model has no place for: ignored, as "
                f"transformers does ({_first(self.ignored)})"
            )
        if self.carried:
            each = [f"{module} ({_tensors(names)})" for module, names in self.carried.items()]
            out.append(f"carried over unchanged, beside the decoder: {', '.join(each)}")
        return out


def leftovers_of(unplaced: Mapping[str, str], place: Place, config: Mapping[str, Any]) -> Leftovers:
    """Sort them. unplaced: stored name → name in the model, had it a place for it. config: what
    config.json holds."""
    roots = {stored: place.root(name) for stored, name in unplaced.items()}
    layers = _mtp_layers(unplaced, roots, place, config)
    carried: dict[str, list[str]] = {}
    ignored = []
    for stored, root in sorted(roots.items()):
        layer = None if root is None else place.layer(root)
        if (
            root is None
            or (layer is not None and layer not in layers)
            or root.rpartition(".")[2] in _OTHER_HEADS
        ):
            ignored.append(stored)
        else:
            carried.setdefault(root, []).append(stored)
    return Leftovers({root: tuple(names) for root, names in carried.items()}, tuple(ignored))


def _mtp_layers(
    unplaced: Iterable[str],
    roots: Mapping[str, str | None],
    place: Place,
    config: Mapping[str, Any],
) -> set[int]:
    """Numbers of the layers behind the last that predict further tokens."""
    text = config.get("text_config")
    both = {**text, **config} if isinstance(text, Mapping) else config
    counts = [both.get(field) for field in _MTP_LAYERS]
    count = max((n for n in counts if type(n) is int), default=0)
    found = set()
    for stored in unplaced:
        root = roots[stored]
        layer = None if root is None else place.layer(root)
        if layer is None or layer < place.n_blocks:
            continue
        if layer < place.n_blocks + count or _MTP.search(stored):
            found.add(layer)
    return found


def _tensors(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _first(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
