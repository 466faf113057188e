"""What config.json of pq's own format says, and what is refused."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from typing import Any

import pytest
from damage import JSON
from hypothesis import given
from hypothesis import strategies as st
from natives import ATTENTION, W4A8, W4A16

from quantize.errors import ModelError
from quantize.formats.bitvec import BitVecScheme
from quantize.formats.compressed_tensors import quantization_config
from quantize.formats.kv4 import KvScheme
from quantize.formats.native import (
    attention_of,
    native_config,
    packed_linears,
    require_understood,
    rotated_inputs_of,
    routing_of,
)
from quantize.formats.packed_int import IntScheme
from quantize.formats.registry import schemes_in
from quantize.formats.routing import Threshold, TopK
from quantize.serving.register import PqConfig


def plain_config(**changes: Any) -> dict[str, Any]:
    return native_config({"a": W4A16}, ["lm_head"], ATTENTION) | changes


def test_the_config_reads_back():
    schemes = {"x.q": W4A16, "x.k": W4A16, "x.v": W4A8}
    config = json.loads(json.dumps(native_config(schemes, ["x.o", "lm_head"], ATTENTION)))
    require_understood(config)
    assert packed_linears(config, ["x.q", "x.k", "x.v", "x.o"]) == schemes
    assert attention_of(config) == ATTENTION
    assert attention_of(native_config(schemes, [], None)) is None
    assert PqConfig(**config).to_dict() == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2 is not known (known: 1); install a newer"),
        ({"version": True}, "version True is not known"),
        ({"version": None}, "version None is not known"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"planes": 3}, "unknown field 'planes'"),
        (
            {"attention": {"kv_cache": KvScheme().as_json()}},
            "attention must be null or have the fields",
        ),
        ({"attention": "fp8"}, "attention must be null"),
        (
            {"attention": ATTENTION | {"query": "int8"}},
            "attention.query is 'int8', expected 'fp8' or null",
        ),
        (
            {"attention": ATTENTION | {"kv_cache": KvScheme().as_json() | {"bits": 3}}},
            "attention.kv_cache: ",
        ),
        ({"attention": ATTENTION | {"kv_cache": None}}, "attention.kv_cache: "),
    ],
)
def test_a_config_that_is_not_understood_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        require_understood(plain_config(**changes))
    assert message in str(caught.value)
    with pytest.raises(ModelError, match=r"^quantization_config: "):
        PqConfig(**plain_config(**changes))


def test_every_field_of_the_config_is_needed():
    for field in plain_config():
        config = plain_config()
        del config[field]
        with pytest.raises(
            ValueError, match=r"version None|field '\w+' is missing|quant_method is None"
        ):
            require_understood(config)


def test_schemes_that_are_not_understood_are_refused():
    config = native_config({"a": W4A16, "b": W4A8}, [], None)
    with pytest.raises(ValueError, match="targets b, which is no linear"):
        packed_linears(config, ["a"])
    for part, value in (
        ("num_bits", "4"),
        ("num_bits", 9),
        ("group_size", 0),
        ("type", "float"),
        ("strategy", None),
    ):
        wrong = copy.deepcopy(config)
        wrong["config_groups"]["group_0"]["weights"][part] = value
        with pytest.raises(ValueError, match="read"):
            packed_linears(wrong, ["a", "b"])
    for groups in (None, {"group_0": {}}, {"group_0": None}, [1]):
        with pytest.raises(ValueError, match="config_groups cannot be read"):
            packed_linears(config | {"config_groups": groups}, ["a"])


# Whatever can be said, reads back

NAMES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    unique=True,
    max_size=8,
)
INT_SCHEMES = st.builds(
    IntScheme, st.integers(2, 8), st.sampled_from([16, 32, 64, 128, 4096]), st.booleans()
)
BITVEC_SCHEMES = st.builds(
    BitVecScheme,
    st.integers(2, 8),
    st.sampled_from([64, 128, 256]),
    st.booleans(),
    st.integers(1, 256),
    st.integers(1, 256),
)
POLICIES = st.builds(TopK, st.integers(1, 64), st.booleans()) | st.builds(
    Threshold, st.floats(allow_nan=False, allow_infinity=False)
)


@given(NAMES, NAMES, st.data())
def test_any_config_reads_back(names: list[str], left_alone: list[str], data: st.DataObject):
    linears = [f"x.{name}" for name in names]
    alone = [f"y.{name}" for name in left_alone]
    schemes = {name: data.draw(INT_SCHEMES | BITVEC_SCHEMES) for name in linears}
    rotated = [name for name in (*linears, *alone) if data.draw(st.booleans())]
    routing = {name: data.draw(POLICIES) for name in alone}
    config = native_config(
        schemes, alone, data.draw(st.sampled_from([None, ATTENTION])), rotated, routing
    )
    config = json.loads(json.dumps(config))
    require_understood(config)
    assert schemes_in(config, [*linears, *alone]) == schemes
    assert rotated_inputs_of(config, [*linears, *alone]) == tuple(rotated)
    assert routing_of(config) == routing


@given(NAMES, NAMES, st.data())
def test_any_compressed_tensors_config_reads_back(
    names: list[str], left_alone: list[str], data: st.DataObject
):
    schemes = {f"x.{name}": data.draw(INT_SCHEMES) for name in names}
    alone = [f"y.{name}" for name in left_alone]
    config = json.loads(json.dumps(quantization_config(schemes, alone)))
    assert schemes_in(config, [*schemes, *alone]) == schemes


@given(JSON, st.sampled_from(["config_groups", "attention", "rotated_inputs", "routing", "ignore"]))
def test_any_other_part_is_refused_with_one_of_the_expected_errors(part: Any, key: str):
    config = native_config({"a": W4A16}, ["b"], ATTENTION, ["a"], {"c": TopK(2)}) | {key: part}
    with suppress(ValueError):
        require_understood(config)
        packed_linears(config, ["a", "b"])
