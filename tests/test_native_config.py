"""What config.json of pq's own format says, and what is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from natives import ATTENTION, W4A8, W4A16

from quantize.errors import ModelError
from quantize.formats.kv4 import KvScheme
from quantize.formats.native import attention_of, native_config, packed_linears, require_understood
from quantize.hf import PqConfig


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
        ({"attention": {"kv_cache": KvScheme().as_json()}}, "attention must be null or have the fields"),
        ({"attention": "fp8"}, "attention must be null"),
        ({"attention": ATTENTION | {"query": "int8"}}, "attention.query is 'int8', expected 'fp8' or null"),
        ({"attention": ATTENTION | {"kv_cache": KvScheme().as_json() | {"bits": 3}}}, "attention.kv_cache: "),
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
        with pytest.raises(ValueError, match=r"version None|field '\w+' is missing|quant_method is None"):
            require_understood(config)


def test_schemes_that_are_not_understood_are_refused():
    config = native_config({"a": W4A16, "b": W4A8}, [], None)
    with pytest.raises(ValueError, match="targets b, which is no linear"):
        packed_linears(config, ["a"])
    for part, value in (("num_bits", "4"), ("num_bits", 9), ("group_size", 0), ("type", "float"), ("strategy", None)):
        wrong = copy.deepcopy(config)
        wrong["config_groups"]["group_0"]["weights"][part] = value
        with pytest.raises(ValueError, match="read"):
            packed_linears(wrong, ["a", "b"])
    for groups in (None, {"group_0": {}}, {"group_0": None}, [1]):
        with pytest.raises(ValueError, match="config_groups cannot be read"):
            packed_linears(config | {"config_groups": groups}, ["a"])
