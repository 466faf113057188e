"""What a strict stage advises is taken and can be served."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quantize.errors import ModelError
from quantize.formats.grouping import GROUPS, WHOLE_ROW
from quantize.methods.adaptation import require_as_asked
from quantize.methods.rtn import Rtn

SIZES = st.sampled_from([64, 100, 128, 172, 192, 256, 576, 640, 1536])


@given(
    st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3),
    st.sampled_from([(32, "none"), (64, "none"), (96, "none"), (128, "none"), (128, "fp8")]),
)
@example([(576, 576), (576, 1536)], (128, "none"))
@example([(100, 172)], (128, "fp8"))
@example([(576, 1536)], (128, "fp8"))
def test_every_remedy_helps(sizes: list[tuple[int, int]], asked: tuple[int, str]):
    group, activations = asked
    stage = Rtn(group_size=group, activations=activations, strict=True)
    linears = {f"model.layers.{i}.a": size for i, size in enumerate(sizes)}
    fits = all(
        K % group == 0 and not (activations == "fp8" and N % 128) for N, K in linears.values()
    )
    try:
        require_as_asked(stage, linears)
    except ModelError as err:
        assert not fits
        said = str(err)
    else:
        assert fits
        return
    assert "\n" not in said
    assert "strict to false" in said
    fields = stage.model_dump()
    if found := re.search(r"group_size to (-?\d+)", said):
        fields["group_size"] = int(found[1])
        assert fields["group_size"] in (*GROUPS, WHOLE_ROW)
        whole = any(K % 32 for _, K in sizes)  # no group suits them all
        assert (fields["group_size"] == WHOLE_ROW) == whole
    if "activations to none" in said:
        fields["activations"] = "none"
    require_as_asked(Rtn.model_validate(fields), linears)


def test_a_stage_of_its_own_ways_is_not_told_to_be_lenient():
    with pytest.raises(ModelError) as caught:
        require_as_asked(Rtn(), {"model.layers.0.a": (64, 100)})
    assert str(caught.value) == (
        "model.layers.0.a: 100 inputs are no multiple of the group 128; add it to ignore"
    )
