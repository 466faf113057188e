"""What is said of vLLM: lines exactly where its kernels refuse, as tried with its CPU build."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from rows import ARCHITECTURES

from quantize.convert.output import fused
from quantize.formats.packed_int import IntScheme
from quantize.formats.vllm import refusals

Q, K, V, O = (f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")  # noqa: E741


def lines(
    sizes: dict[str, tuple[int, int]],
    *schemes: IntScheme,
    together: Collection[tuple[str, ...]] = (),
) -> list[str]:
    return refusals(dict(zip(sizes, schemes, strict=True)), sizes, together)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_what_it_takes(bits: int, group: int | None):
    assert lines({O: (576, 1536)}, IntScheme(bits, group, False)) == []


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_bits_without_a_kernel(bits: int):
    (line,) = lines({O: (576, 1536)}, IntScheme(bits, 64, False))
    assert line.startswith(f"1 linear: {bits} bits, which it multiplies only on a GPU")


@pytest.mark.parametrize("group", [16, 96, 256])
def test_groups_without_a_kernel(group: int):
    (line,) = lines({O: (576, 1536)}, IntScheme(4, group, False))
    assert f"1 linear: group {group}, for which it has no kernel" in line
    assert "set group_size to 128" in line


def test_sizes_of_the_cpu_build_are_those_of_the_fused_matrix():
    narrow = {Q: (48, 96), K: (24, 96), V: (24, 96)}
    whole = [IntScheme(4, 32, False)] * 3
    assert lines(narrow, *whole, together=[(Q, K, V)]) == []  # 96 rows in all
    (line,) = lines(narrow, *whole)
    assert line == (
        "3 linears on a CPU, whose kernel takes multiples of 32 alone and not 24, 48; serve on a "
        "GPU, or with transformers"
    )
    (line,) = lines({O: (96, 100)}, IntScheme(4, None, False))
    assert "and not 100;" in line


def test_parts_of_one_matrix_that_differ():
    sizes = {Q: (256, 128), K: (128, 128), V: (128, 128)}
    four, eight = IntScheme(4, 128, False), IntScheme(8, 128, False)
    assert lines(sizes, four, four, four, together=[(Q, K, V)]) == []
    (line,) = lines(sizes, four, four, eight, together=[(Q, K, V)])
    assert line.startswith(
        "q_proj, k_proj and v_proj of model.layers.0.self_attn are packed in different ways, and"
    )
    (line,) = refusals({Q: four, K: four}, sizes, [(Q, K, V)])  # v stays 16-bit
    assert "packed in different ways" in line


def test_what_stands_side_by_side_is_one_matrix_in_experts_too():
    names = [f"model.layers.1.{name}" for name in ARCHITECTURES["qwen2_moe"].roles]
    parts = ("gate_proj", "up_proj", "down_proj")
    names += [f"model.layers.0.mlp.experts.{e}.{part}" for e in (0, 1) for part in parts]
    found = fused(ARCHITECTURES["qwen2_moe"], [*names, "lm_head"])
    assert [[name.removeprefix("model.layers.") for name in group] for group in found] == [
        ["1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"],
        ["1.mlp.gate_proj", "1.mlp.up_proj"],
        ["0.mlp.experts.0.gate_proj", "0.mlp.experts.0.up_proj"],
        ["0.mlp.experts.1.gate_proj", "0.mlp.experts.1.up_proj"],
    ]  # fmt: skip


CPU_LINE = "6 linears on a CPU, whose kernel takes multiples of 32 alone and not 172, 344"


@pytest.mark.parametrize(
    ("sizes", "fields", "says"),
    [
        ({}, "ignore: []", None),
        ({}, "bits: 3", "not in vLLM: 14 linears: 3 bits"),
        (
            {"hidden_size": 192},
            "group_size: 96, layers: ['*.gate_proj', '*.up_proj']",
            "4 linears: group 96",
        ),
        ({}, "ignore: ['*.v_proj']", "not in vLLM: q_proj, k_proj and v_proj of model.layers.0."),
        ({"intermediate_size": 172}, "ignore: []", f"not in vLLM: {CPU_LINE}"),
        ({"hidden_size": 192}, "group_size: 96}]\nformat: pq\n#", None),
    ],
)
def test_convert_says_it(
    pq: Callable[..., tuple[int, str, str]],
    tiny: Callable[..., Path],
    tmp_path: Path,
    sizes: dict[str, Any],
    fields: str,
    says: str | None,
):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"description: d\nstages: [{{method: rtn, {fields}}}]\n")
    code, _, err = pq("convert", "-m", tiny("llama", **sizes), "-r", recipe, "-o", tmp_path / "out")
    assert code == 0, err
    said = " ".join(err.split())
    assert (says in said) if says else ("not in vLLM" not in said)
