"""One law per kind of stage, over every shipped method and every architecture."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import row_of
from torch import Tensor

from quantize.block.block import Block
from quantize.errors import ModelError
from quantize.methods import STAGES, Stage
from quantize.methods.encode import IntEncode
from quantize.model.linear import PackedLinear

BlockMaker = Callable[..., Block]
SMOOTH = [cls for cls in STAGES if cls.kind == "smooth"]
ENCODE = [cls for cls in STAGES if cls.kind == "encode"]
INTEGER = [cls for cls in ENCODE if issubclass(cls, IntEncode)]
GRADED = [cls for cls in ENCODE if "bits" in cls.model_fields]
"""Whose bits a recipe gives: those of blocks follow from their type."""
QUICK: dict[str, dict[str, Any]] = {"sbvr": {"lines": 8, "sweeps": 1}}
"""Fields that make a method cheaper where a test runs it at many bits."""


def named(cls: type[Stage]) -> str:
    return str(cls.model_fields["method"].default)


def apply(make_block: BlockMaker, cls: type[Stage], model_type: str, **fields: Any) -> Block:
    stage = cls(**fields)
    block = make_block(model_type, with_parent=stage.needs_parent)
    if not stage.needs_inputs:
        block.inputs = []
    with torch.no_grad():
        stage.apply(block)
    return block


@functools.cache
def encoded(make_block: BlockMaker, cls: type[Stage], model_type: str) -> Block:
    """A block that a stage encoded, made once: read it, never change it. With the stage's defaults
    on one architecture, with what makes it quicker on the others."""
    fields = {} if model_type == "llama" else QUICK.get(named(cls), {})
    return apply(make_block, cls, model_type, **fields)


def outputs(block: Block, inputs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([block.forward(block.module, x) for x in inputs])


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_every_kind_has_its_law():
    known = {"restructure", "smooth", "cache", "encode"}
    assert {cls.kind for cls in STAGES} <= known, "write the law of the new kind in this file"
    # The law of restructure, that the output loads by its own config.json, needs a whole model: test_ladimo.py.
    # The law of cache, that scales alone leave the function as it was, stands in test_attention.py.
    assert len({named(cls) for cls in STAGES}) == len(STAGES)


@pytest.mark.parametrize("cls", SMOOTH, ids=named)
def test_smooth_leaves_the_function_alone(
    make_block: BlockMaker, cls: type[Stage], model_type: str
):
    plain = make_block(model_type)
    block = apply(make_block, cls, model_type)
    stage = cls()
    # A stage may leave the residual stream in another basis, but then one and the same on both sides of the block.
    turned = [stage.to_basis(x) for x in plain.inputs]
    assert difference(outputs(block, turned), stage.to_basis(outputs(plain, plain.inputs))) < 1e-5
    assert all(
        difference(stage.from_basis(x), y) < 1e-6 for x, y in zip(turned, plain.inputs, strict=True)
    )
    assert (
        any(difference(x, y) > 0.1 for x, y in zip(turned, plain.inputs, strict=True))
        == stage.changes_basis
    )
    moved = [
        n
        for n, p in block.module.named_parameters()
        if not torch.equal(p, plain.module.get_parameter(n))
    ]
    assert moved
    assert not block.packed
    for name, parameter in block.module.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.isfinite(parameter).all(), name


@pytest.mark.parametrize("cls", ENCODE, ids=named)
def test_encode_packs_every_linear_bit_exactly(
    make_block: BlockMaker, cls: type[Stage], model_type: str
):
    block = encoded(make_block, cls, model_type)
    assert set(block.packed) == set(row_of(model_type).roles)
    for name, packed in block.packed.items():
        linear = block.module.get_submodule(name)
        assert isinstance(linear, PackedLinear)
        stored = packed.tensors()
        scheme = packed.scheme(linear.fp8_activations)
        back = scheme.read(stored)
        for suffix, tensor in back.tensors().items():
            assert torch.equal(tensor, stored[suffix]), suffix
            assert (tensor.dtype, tuple(tensor.shape)) == scheme.layout(*packed.shape)[suffix]
        assert packed.bits_per_weight == scheme.stored_bits(*packed.shape)
        expected = back.kernel_weight() if linear.fp8_activations else back.unpack()
        assert torch.equal(linear.weight, expected)
        assert torch.isfinite(linear.weight).all()


@pytest.mark.parametrize("cls", ENCODE, ids=named)
def test_encode_stays_near_the_parent(make_block: BlockMaker, cls: type[Stage], model_type: str):
    plain = make_block(model_type)
    block = encoded(make_block, cls, model_type)
    assert difference(outputs(block, plain.inputs), outputs(plain, plain.inputs)) < 0.2
    for name, facts in block.report.items():
        assert 0 < facts["weight_error"] < 0.2, name
        assert "fallback" not in facts
        assert ("output_error" in facts) == cls().needs_inputs


@pytest.mark.parametrize("cls", ENCODE, ids=named)
def test_encode_leaves_the_rest_of_the_block_alone(
    make_block: BlockMaker, cls: type[Stage], model_type: str
):
    plain = dict(make_block(model_type).module.named_parameters())
    for name, parameter in encoded(make_block, cls, model_type).module.named_parameters():
        if name.rpartition(".")[0] not in row_of(model_type).roles or name.endswith(".bias"):
            assert torch.equal(parameter, plain[name]), name


@pytest.mark.parametrize("cls", GRADED, ids=named)
def test_error_falls_as_bits_rise(make_block: BlockMaker, cls: type[Stage], model_type: str):
    plain = make_block(model_type)
    wanted = outputs(plain, plain.inputs)
    errors = []
    # A fit takes seconds: every number of bits on one architecture, two on the others.
    for bits in (2, 3, 4, 8) if model_type == "llama" else (2, 4):
        fields = {"activations": "none"} if cls in INTEGER else QUICK.get(named(cls), {})
        block = apply(make_block, cls, model_type, bits=bits, **fields)
        assert {packed.bits for packed in block.packed.values()} == {bits}
        errors.append(difference(outputs(block, plain.inputs), wanted))
    assert all(high > 1.5 * low for high, low in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("cls", [cls for cls in STAGES if not cls().needs_plan], ids=named)
def test_a_stage_repeats_bit_for_bit(make_block: BlockMaker, cls: type[Stage]):
    one = encoded(make_block, cls, "llama")
    two = apply(make_block, cls, "llama")
    for (name, a), (_, b) in zip(
        one.module.named_parameters(), two.module.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert one.report == two.report


@pytest.mark.parametrize("cls", ENCODE, ids=named)
def test_encode_takes_the_layers_it_is_given(make_block: BlockMaker, cls: type[Stage]):
    block = apply(
        make_block, cls, "llama", layers=("*.mlp.*", "*.q_proj"), ignore=("*.0.mlp.down_proj",)
    )
    assert set(block.packed) == {"mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj"}


LINEARS = {
    "model.layers.0.a": (128, 256),
    "model.layers.0.b": (64, 128),
    "model.layers.1.a": (128, 96),
}


@pytest.mark.parametrize("cls", INTEGER, ids=named)
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"activations": "none"},
            r"model\.layers\.1\.a: 96 inputs are no multiple of the group 128; set group_size",
        ),
        (
            {"activations": "fp8", "ignore": ("*.1.*",)},
            r"model\.layers\.0\.b: 64 outputs are no multiple of 128",
        ),
    ],
)
def test_shapes_are_refused_before_any_work(cls: type[Stage], fields: dict[str, Any], says: str):
    with pytest.raises(ModelError, match=says):
        cls(strict=True, **fields).check(LINEARS)


@pytest.mark.parametrize("cls", INTEGER, ids=named)
def test_shapes_that_fit_pass(cls: type[Stage]):
    cls(activations="none", group_size=32, strict=True).check(LINEARS)
    cls(activations="fp8", layers=("model.layers.0.*",), ignore=("*.b",), strict=True).check(
        LINEARS
    )
    cls().check(LINEARS)  # what is not strict gives way


@pytest.mark.parametrize("cls", [cls for cls in ENCODE if cls().needs_inputs], ids=named)
@pytest.mark.parametrize("inputs", ["zero", "huge", "one token"])
def test_encode_survives_poor_calibration(make_block: BlockMaker, cls: type[Stage], inputs: str):
    stage = cls()
    block = make_block("qwen2", with_parent=stage.needs_parent)
    change = {
        "zero": lambda x: x * 0,
        "huge": lambda x: x * 1e30,
        "one token": lambda x: x[:1, :1],
    }[inputs]
    block.inputs = [change(x) for x in block.inputs[:1]]
    if block.parent_inputs is not None:
        block.parent_inputs = [change(x) for x in block.parent_inputs[:1]]
    with torch.no_grad():
        stage.apply(block)
    for name, packed in block.packed.items():
        assert torch.isfinite(packed.unpack()).all(), name
        assert torch.isfinite(block.module.get_submodule(name).weight).all(), name
        assert 0 < block.report[name]["weight_error"] < 1, name
