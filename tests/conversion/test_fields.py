"""Dataclasses as JSON and tensors: what comes back is what was written, and nothing is left out
unseen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from quantize.conversion.fields import Codec, Fields, layout
from quantize.conversion.plan import Decisions
from quantize.conversion.snapshot import _FIELDS, state_layout
from quantize.conversion.state import State
from quantize.cost.peak import Cost
from quantize.formats.packed_int import IntScheme
from quantize.formats.routing import Threshold, TopK

FIELDS = Fields({complex: Codec(lambda z: [z.real, z.imag], lambda parts: complex(*parts))})


@dataclass
class Inner:
    name: str
    share: float | None = None


@dataclass
class Outer:
    kind: Literal["a", "b"] = "a"
    facts: dict[str, Any] = field(default_factory=dict)
    by_number: Mapping[int, Inner] = field(default_factory=dict)
    by_pair: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    one: Tensor | None = None
    special: list[complex] = field(default_factory=list)
    several: tuple[int, ...] = ()
    mixed: tuple[str, Inner] | None = None


def back(value: Any, fields: Fields = FIELDS) -> Any:
    facts, tensors = fields.write(value)
    return fields.read(type(value), json.loads(json.dumps(facts)), tensors)


def test_all_comes_back_in_its_order():
    tensors = [torch.arange(3), torch.arange(3) + 1]
    value = Outer(
        kind="b",
        facts={"z": [1, None], "a": 0.1},
        by_number={8: Inner("eight", 0.3), 4: Inner("four")},
        by_pair={("q", 4): tensors, ("k", 2): tensors[:1]},
        one=torch.tensor([torch.nan, 1.5], dtype=torch.bfloat16),
        special=[1j, 2 + 1j, 1j],
        several=(3, 1),
        mixed=("x", Inner("y")),
    )
    found = back(value)
    for name in ("kind", "facts", "by_number", "special", "several", "mixed"):
        assert getattr(found, name) == getattr(value, name), name
    assert list(found.facts) == ["z", "a"]
    assert list(found.by_pair) == [("q", 4), ("k", 2)]
    assert all(map(torch.equal, found.by_pair["q", 4], tensors))
    assert found.one.dtype == torch.bfloat16
    assert torch.equal(
        found.one.view(torch.int16), value.one.view(torch.int16)
    )  # NaN equals nothing
    assert back(Outer()) == Outer()


def test_equal_special_values_are_kept_once():
    facts, _ = FIELDS.write(Outer(special=[1j, 2j, 1j]))
    assert facts["shared"] == [[0, 1], [0, 2]]
    assert facts["fields"]["special"] == [0, 1, 0]


def test_a_type_that_cannot_be_stored_is_refused_by_name():
    @dataclass
    class Wrong:
        inner: object = None

    with pytest.raises(TypeError, match=r"inner: there is no way to store <class 'object'>"):
        FIELDS.write(Wrong())


# What a run knows

VALUES: dict[str, Any] = {
    "schemes": {
        "a": IntScheme(4, 128, True),
        "b": IntScheme(8, 64, False),
        "c": IntScheme(4, 128, True),
    },
    "rotated_inputs": ["a"],
    "routing": {"m": Threshold(0.25), "n": TopK(2, True)},
    "report": {"a": {"weight_error": 0.1, "notes": [1, None]}},
    "costs": {"a": Cost(1.5, None)},
    "stored_bits": 4.125,
    "weights": 7,
    "source_bytes": 9,
    "untied_head_bytes": 3,
}


def filled() -> State:
    state = State(**VALUES)
    state.statistics.blocks.append({"index": 0})
    state.statistics.histograms["q", 4, 128] = torch.arange(96)
    state.statistics.points["q", 4, 128] = [torch.arange(16.0), torch.arange(16.0) / 3]
    return state


def test_every_field_of_the_state_comes_back():
    assert {f.name for f in dataclasses.fields(State)} == {*VALUES, "statistics"}, (
        "give the new field a value above"
    )
    state = filled()
    found = back(state, _FIELDS)
    for name, value in VALUES.items():
        assert getattr(found, name) == value, name
    assert found.schemes["a"] is found.schemes["c"]
    assert found.statistics.as_json() == state.statistics.as_json()
    found.statistics.points["q", 4, 128].append(
        torch.arange(16.0)
    )  # a list as before, to which blocks add


def test_a_field_that_is_added_is_kept_without_a_word_about_it():
    @dataclass
    class Later(State):
        seen: dict[str, list[int]] = field(default_factory=dict)
        mean: Tensor | None = None

    later = Later(**vars(filled()), seen={"x": [1, 2]}, mean=torch.ones(3))
    found = back(later, _FIELDS)
    assert found.seen == {"x": [1, 2]}
    assert torch.equal(found.mean, torch.ones(3))
    assert found.schemes == later.schemes
    assert layout(Later) != layout(State)


def test_the_layout_names_every_field():
    assert set(state_layout()["State"]) == {f.name for f in dataclasses.fields(State)}
    assert set(state_layout()["Decisions"]) == {f.name for f in dataclasses.fields(Decisions)}
