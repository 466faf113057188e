"""What is derived of a model is what is known of it (tests/rows.py)."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from conftest import CPU, TINY, ModelMaker, row_of

from quantize.block.walk import Pass
from quantize.files.checkpoint import Checkpoint
from quantize.model.prove import prove
from quantize.model.skeleton import Skeleton


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("model_type", TINY)
def test_derived_is_what_is_known(tiny: ModelMaker, model_type: str, index: int):
    folder = tiny(model_type)
    skeleton = Skeleton(folder, CPU, torch.float32)
    derived, known = skeleton.block_arch(index), row_of(model_type, index)
    source = Checkpoint(folder)
    layer = skeleton.layer(index, source.tensors(f"{skeleton.outer.blocks}.{index}."))
    proof = prove(derived, layer, Pass(skeleton, index), skeleton.stream)
    assert proof.dropped == {}
    different = {
        field.name: (getattr(proof.arch, field.name), getattr(known, field.name))
        for field in fields(known)
        if field.name not in ("experts", "model_type")
        and getattr(proof.arch, field.name) != getattr(known, field.name)
    }
    assert different == {}
