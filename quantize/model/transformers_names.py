"""transformers' own way between the names and forms of stored tensors and those of its models."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


class Conversion:
    """transformers' own way from the tensors of a checkpoint to those of a model, and back.

    It is told of tensors alone and never loads: what is given may be lazy
    (`quantize/model/lazy.py`). model: as transformers builds it, on any device; it is not kept.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        held = model.state_dict(keep_vars=True)
        self.tensors: dict[str, Tensor] = {n: t.detach().to("meta") for n, t in held.items()}
        """The model's tensors by name, buffers that are stored among them; without numbers."""
        same: dict[int, list[str]] = {}
        for name, tensor in held.items():
            same.setdefault(id(tensor), []).append(name)
        self.tied = {name: tuple(same[id(tensor)]) for name, tensor in held.items()}
        """Every name of a tensor that has several."""
        self.modules = frozenset(name for name, _ in model.named_modules())
        self.unstacked = frozenset(n for n, m in model.named_modules() if _unstacks_packed(m))
        """Modules of stacked experts that the loader of compressed-tensors replaces by a linear for
        each expert and role."""
        self.prefix: str = model.base_model_prefix
        """What names of the whole model have before those of its part without a head."""
        self.config = model.config
        self._own = get_model_conversion_mapping(model, add_legacy=False)
        self._legacy = get_model_conversion_mapping(model)[len(self._own) :]
        every = [*self._own, *self._legacy]
        self._converters = [one for one in every if isinstance(one, WeightConverter)]
        self._renamings = [one for one in every if not isinstance(one, WeightConverter)]
        self._by_pattern = {p: one for one in self._converters for p in one.source_patterns}

    def place(self, stored: str) -> tuple[str, Any, str]:
        """Name in a checkpoint → name in the model, the converter that it goes through (None: it
        is taken as it is), and the converter's pattern for it."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(
            stored, self._renamings, self._converters, self.prefix, self.tensors
        )
        if name not in self.tensors and stored in self.tensors:
            # It has the model's own name, which a pattern happens to fit.
            name, pattern = rename_source_key(stored, [], [], self.prefix, self.tensors)
        return name, None if pattern is None else self._by_pattern[pattern], pattern or ""

    def in_order(self, stored: Iterable[str]) -> list[str]:
        """Names as transformers takes them one after the other: expert 2 before 10."""
        from transformers.core_model_loading import dot_natural_key

        return sorted(stored, key=dot_natural_key)

    def convert(
        self, name: str, converter: Any, given: Mapping[str, list[Tensor]]
    ) -> dict[str, Tensor]:
        """Pattern → tensors that one converter collected for `name` → tensors of the model.

        ValueError, RuntimeError and others where they do not fit each other.
        """
        one = copy.deepcopy(converter)
        for pattern, tensors in given.items():
            for tensor in tensors:
                one.add_tensor(name, name, pattern, tensor)
        made = one.convert(name, model=self, config=self.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    def get_parameter(self, name: str) -> Tensor:
        """As a model has it: some operations ask for a parameter's shape."""
        return self.tensors[name]

    def store(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model → those of a checkpoint in the form in which its type was published.

        Prefixes that a checkpoint may or may not have are as in the names that were `place`d.
        """
        from transformers.core_model_loading import PrefixChange, revert_weight_conversion

        self._weight_conversions = [
            one for one in self._own if one.was_used() or not isinstance(one, PrefixChange)
        ] + [one for one in self._legacy if one.was_used()]
        made: dict[str, Tensor] = revert_weight_conversion(self, dict(tensors))
        return made


def _unstacks_packed(experts: nn.Module) -> bool:
    from transformers.quantizers import base
    from transformers.utils.quantization_config import QuantizationMethod

    table = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    entry = table.get(type(experts).__name__)
    return bool(entry and QuantizationMethod.COMPRESSED_TENSORS in entry["quantization_methods"])
