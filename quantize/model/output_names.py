"""Under which names and in which form tensors are written, so that other readers take them.

What is untouched keeps its stored name and form. Packed linears of experts stand one by one: in the
published names where a type is published expert by expert (Mixtral's `experts.3.w1`), which stock
transformers decompresses and stacks and vLLM's mappings of experts look for; elsewhere as
`experts.3.gate_proj`, as llm-compressor writes them, which vLLM reads for Llama 4. Stock transformers
reads these of Llama 4 alone (`OutputNames.unloadable`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

from torch import Tensor

from quantize.model.conversion import owner_of, published_names, renamed_like
from quantize.model.experts import Layout
from quantize.model.transformers_names import Conversion
from quantize.model.where import Where, names_in


class OutputNames:
    """Names of what is made of one checkpoint.

    conversion, layouts: the model's. parts, form: its `parts_of` and `published`. stored: name of
    every tensor that is stored as the model has it → its stored name. on_disk: names of all stored
    tensors. transposed: the weights that are stored [inputs, outputs].
    """

    def __init__(
        self,
        conversion: Conversion,
        layouts: Mapping[str, Layout],
        parts: Mapping[str, Where],
        form: Mapping[str, Where],
        stored: Mapping[str, str],
        on_disk: Iterable[str],
        transposed: Collection[str] = (),
    ) -> None:
        self._transposed = transposed
        self._conversion, self._layouts, self._stored = conversion, layouts, stored
        self._published = published_names(parts, form)
        self._parts: dict[str, set[str]] = {module: set() for module in layouts}
        for name in parts:
            home = name.rsplit(".", 3)[0]
            if home in self._parts:
                self._parts[home].add(name)
        self._by_bare = {self._bare(name): name for name in on_disk}
        owners = {owner_of(name) for name in self._by_bare}
        # Of experts that are stored in another form than they are published in, readers other
        # than transformers know the published one alone, and all names that go with it.
        self._restores = not all(
            self._bare(name) in self._by_bare
            or (name.endswith(".weight") and owner_of(self._bare(name)) in owners)
            for name, place in form.items()
            if any(owner_of(part) in layouts for part in names_in(place))
        )

    def _bare(self, name: str) -> str:
        return name.removeprefix(f"{self._conversion.prefix}.")

    def name(self, name: str) -> str:
        """The name under which a tensor is written, by the model's name for it. Parts of packed
        linears follow their weights."""
        owner, _, part = name.rpartition(".")
        for known, end in ((name, ""), (f"{owner}.weight", "weight")):
            if (found := self._known(known)) is not None and found.endswith(end):
                return f"{found.removesuffix(end)}{part}" if end else found
        return renamed_like(name, self._names)

    def _known(self, name: str) -> str | None:
        found = None if self._restores else self._stored.get(name)
        if found is None and (found := self._published.get(name)) is not None:
            return self._with_prefix(found)
        return found

    def _with_prefix(self, name: str) -> str:
        """A published name as this checkpoint has it: with or without the model's prefix."""
        return name if self._restores else self._by_bare.get(self._bare(name), name)

    @cached_property
    def _names(self) -> dict[str, str]:
        known = {name: self._known(name) for name in (*self._stored, *self._published)}
        return {name: found for name, found in known.items() if found is not None}

    def in_config(self, linear: str) -> tuple[str, ...]:
        """Names by which config.json must call a linear: transformers looks for those of its
        modules; vLLM for the stored ones, and for `gate_proj` and the like below what its own
        module of experts is called, which is as published (vLLM pull request 55814)."""
        names = [linear, owner_of(self.name(f"{linear}.weight"))]
        for experts in self._layouts:
            if linear.startswith(f"{experts}.") and ".experts." in names[1]:
                home = names[1].rpartition(".experts.")[0]
                names.append(f"{home}.experts.{linear.removeprefix(f'{experts}.')}")
        return tuple(dict.fromkeys(names))

    def written(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of whole modules by the model's names → the same as they are written: experts
        that are published as stacks, and of which nothing is packed, are stacked again."""
        left = {n: t.T.contiguous() if n in self._transposed else t for n, t in tensors.items()}
        out: dict[str, Tensor] = {}
        for module, layout in self._layouts.items():
            inside = {name for name in left if name.startswith(f"{module}.")}
            if not inside or f"{module}.0.down_proj.weight" in self._published:
                continue
            if inside != self._parts[module]:
                continue
            stacks = [n for n in self._conversion.tensors if owner_of(n) == module]
            given: dict[int, dict[str, Tensor]] = {}
            for name in inside:
                expert, _, part = name.removeprefix(f"{module}.").partition(".")
                given.setdefault(int(expert), {})[part] = left.pop(name)
            experts = [given[expert] for expert in sorted(given)]
            whole = {n: layout.stacked(n.rpartition(".")[2], experts) for n in stacks}
            made = self._conversion.store(whole)
            out |= {self._with_prefix(name): tensor for name, tensor in made.items()}
        return out | {self.name(name): tensor for name, tensor in left.items()}

    def unloadable(self, packed: Iterable[str]) -> tuple[str, ...]:
        """Modules of experts that stock transformers does not load with these linears packed: it
        decompresses experts one by one, and knows no such form of a type that is published with
        its experts stacked."""
        homes = {name.rsplit(".", 2)[0] for name in packed}
        return tuple(
            module
            for module in self._layouts
            if module in homes
            and f"{module}.0.down_proj.weight" not in self._published
            and module not in self._conversion.unstacked
        )
