"""What is said of vLLM: lines exactly where its kernels refuse, as tried with its CPU build."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rows import ARCHITECTURES

from quantize.conversion.serving import fused
from quantize.formats.engines import VLLM, kernels_for
from quantize.formats.packed_int import IntScheme
from quantize.formats.vllm import unserved

Q, K, V, O = (f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")  # noqa: E741


def lines(
    sizes: dict[str, tuple[int, int]],
    *schemes: IntScheme,
    together: Collection[tuple[str, ...]] = (),
    routed: Collection[tuple[str, ...]] = (),
) -> list[str]:
    found = unserved(dict(zip(sizes, schemes, strict=True)), sizes, together, routed)
    return [str(line) for line in found]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_what_it_takes(bits: int, group: int | None):
    told = lines({O: (576, 1536)}, IntScheme(bits, group, False))
    on_cpus = "not in vLLM 0.32 on CPUs: 1 linear of 8 bits; serve on a GPU, or with transformers"
    assert told == ([on_cpus] if bits == 8 else [])


@pytest.mark.parametrize(("bits", "near"), [(2, 4), (3, 4), (5, 8), (6, 8), (7, 8)])
def test_bits_without_a_kernel(bits: int, near: int):
    (line,) = unserved({O: IntScheme(bits, 64, False)}, {O: (576, 1536)}, [])
    assert line.refused
    assert str(line) == (
        f"not in vLLM 0.32: 1 linear: {bits} bits, which only the optional humming kernels multiply, "
        f"on GPUs; set bits to {near}"
    )
    advised = unserved({O: IntScheme(near, 64, False)}, {O: (576, 1536)}, [])
    assert not any(line.refused for line in advised)


@pytest.mark.parametrize(
    ("group", "inputs", "near"), [(16, 1536, 128), (96, 576, 64), (96, 96, 32), (48, 336, None)]
)
def test_advice_on_groups_is_served(group: int, inputs: int, near: int | None):
    (line,) = unserved({O: IntScheme(4, group, False)}, {O: (64, inputs)}, [])
    assert line.refused
    assert f"1 linear: group {group}, for which it has no kernel" in str(line)
    wanted = "128; what it does not divide gets" if near is None else f"{near}"
    assert f"set group_size to {wanted}" in str(line)
    if near is not None:
        assert inputs % near == 0
        assert unserved({O: IntScheme(4, near, False)}, {O: (64, inputs)}, []) == []


def test_groups_of_256_have_a_kernel_at_4_bits_outside_experts():
    four, eight = IntScheme(4, 256, False), IntScheme(8, 256, False)
    assert lines({O: (576, 1536)}, four) == []
    assert "group 256" in lines({O: (576, 1536)}, eight)[0]
    expert = "model.layers.0.mlp.experts.0.down_proj"
    assert "group 256" in lines({expert: (576, 1536)}, four, routed=[(expert,)])[0]


def test_inputs_in_fp8_are_served_by_one_generation():
    (line,) = unserved({O: IntScheme(4, 128, True)}, {O: (256, 512)}, [])
    assert not line.refused
    assert line.where == "vLLM 0.32 but on H100 and H200"
    assert "activations: none" in line.what


def test_sizes_of_the_cpu_build_are_those_of_the_fused_matrix():
    narrow = {Q: (48, 96), K: (24, 96), V: (24, 96)}
    whole = [IntScheme(4, 32, False)] * 3
    assert lines(narrow, *whole, together=[(Q, K, V)]) == []  # 96 rows in all
    (line,) = lines(narrow, *whole)
    assert line == (
        "not in vLLM 0.32 on CPUs: 3 linears of sizes that 32 does not divide (24, 48); serve on a "
        "GPU, or with transformers"
    )
    (line,) = lines({O: (96, 100)}, IntScheme(4, None, False))
    assert "does not divide (100);" in line


def test_parts_of_one_matrix_that_differ():
    sizes = {Q: (256, 128), K: (128, 128), V: (128, 128)}
    four, eight = IntScheme(4, 128, False), IntScheme(8, 128, False)
    assert lines(sizes, four, four, four, together=[(Q, K, V)]) == []
    (line,) = unserved({Q: four, K: four, V: eight}, sizes, [(Q, K, V)])
    assert line.refused
    assert line.what.startswith(
        "q_proj, k_proj and v_proj of model.layers.0.self_attn are packed in different ways, and"
    )
    (line,) = unserved({Q: four, K: four}, sizes, [(Q, K, V)])  # v stays 16-bit
    assert "packed in different ways" in line.what


def test_experts_that_differ_are_one_line():
    names = [f"model.layers.3.mlp.experts.{e}.{part}" for e in (0, 1) for part in ("gate", "up")]
    sizes = dict.fromkeys(names, (64, 128))
    four, eight = IntScheme(4, 128, False), IntScheme(8, 128, False)
    gated = [tuple(names[:2]), tuple(names[2:])]
    for schemes in ([four, four, eight, eight], [four, eight, four, eight]):
        told = lines(sizes, *schemes, together=gated, routed=[tuple(names)])
        assert [line for line in told if "different ways" in line] == [
            "not in vLLM 0.32: the experts of model.layers.3.mlp are packed in different ways, and "
            "it makes one matrix of them; let one stage take them, or leave all of them out"
        ]
    (line,) = lines(sizes, *[four] * 4, together=gated, routed=[tuple(names)])
    assert line.startswith("not in vLLM 0.32 on CPUs: 4 linears of routed experts, which need AMX")


def test_every_kernel_of_vllm_is_reached():
    every = [
        IntScheme(bits, group, fp8)
        for bits in range(2, 9)
        for group in (32, 96, 128, 256, None)
        for fp8 in (False, True)
    ]
    reached = {kernel.name for scheme in every for kernel in kernels_for(VLLM, scheme)}
    assert reached == {"Marlin", "Triton", "humming", "CUTLASS W4A8", "CPU", "pq's own"}


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


def test_what_shares_an_input_and_stays_apart_in_vllm_is_no_part_of_a_matrix():
    """The gate of an attention, whatever it is called; latent attention has a pair of its own."""
    names = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "g_proj", "gating")]
    latent = [f"self_attn.{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa", "wide_proj")]
    for found, together in ((names, names[:3]), (latent, latent[:2])):
        arch = replace(ARCHITECTURES["llama"], calibration_order=(tuple(found),))
        assert fused(arch, found) == [tuple(together)]


CPU_LINE = "6 linears of sizes that 32 does not divide (172, 344)"


@pytest.mark.parametrize(
    ("sizes", "fields", "says"),
    [
        ({}, "ignore: []", None),
        ({}, "bits: 3", "not in vLLM 0.32: 14 linears: 3 bits"),
        (
            {"hidden_size": 192},
            "group_size: 96, layers: ['*.gate_proj', '*.up_proj']",
            "4 linears: group 96",
        ),
        (
            {},
            "ignore: ['*.v_proj']",
            "not in vLLM 0.32: q_proj, k_proj and v_proj of model.layers.0.",
        ),
        ({"intermediate_size": 172}, "ignore: []", f"not in vLLM 0.32 on CPUs: {CPU_LINE}"),
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
    if says is None:
        assert "not in vLLM" not in said
        return
    assert said.count(says) == 2  # before any work, and at the end
    assert said.index(says) < said.index("report:") < said.rindex(says)


def test_strict_serving_refuses_before_any_work(
    pq: Callable[..., tuple[int, str, str]], tiny: Callable[..., Path], tmp_path: Path
):
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    stage = "description: d\nstages: [{method: gptq, bits: 3, ignore: ['*.v_proj']}]\n"
    recipe.write_text(f"{stage}calibration: {{dataset: no-such-text}}\n")
    model = tiny("llama")
    code, _, err = pq("convert", "-m", model, "-r", recipe, "-o", out, "--strict-serving")
    assert code == 3, err  # not 5: the text is not looked for
    problems = [line for line in err.splitlines() if line.startswith("pq: error: ")]
    assert len(problems) == 2
    assert all("recipe r: --strict-serving: not in vLLM 0.32:" in line for line in problems)
    assert "3 bits" in problems[0]
    assert "q_proj, k_proj and v_proj" in problems[1]
    assert not out.exists()
    for fields, code in (("bits: 4}]\nformat: pq\n#", 3), ("bits: 8", 0)):
        recipe.write_text(f"description: d\nstages: [{{method: rtn, {fields}}}]\n")
        found, _, err = pq("convert", "-m", model, "-r", recipe, "-o", out, "--strict-serving")
        assert found == code, err


def test_estimate_and_validate_say_it(
    pq: Callable[..., tuple[int, str, str]], tiny: Callable[..., Path], tmp_path: Path
):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("description: d\nstages: [{method: rtn, bits: 3, ignore: ['*.up_proj']}]\n")
    code, _, err = pq("estimate", "-m", tiny("llama"), "-r", recipe, "--no-time")
    assert code == 0
    assert "not in vLLM 0.32: 12 linears: 3 bits" in err
    assert "gate_proj and up_proj of model.layers.0.mlp are packed in different ways" in err
    code, out, err = pq("recipe", "validate", recipe)
    assert (code, out) == (0, f"{recipe}: ok\n")
    assert f"{recipe}: not in vLLM 0.32: linears: 3 bits" in err
    assert "gate_proj and up_proj of model.layers.0.mlp are packed in different ways" in err
