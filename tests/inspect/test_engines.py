"""What is said of engines about checkpoints as they lie on disk, by the one table."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize.formats.engines import ADA, AMPERE, CPU, HOPPER, PLUGIN, TURING, runs_on
from quantize.formats.native import native_config
from quantize.formats.routing import Policy, TopK
from quantize.inspect.engines import Loadings, loadings
from quantize.plan.checkpoint import served_model
from quantize.plan.gpus import gpu_named

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]


def told(found: Loadings, engine: str, *install: str) -> dict[str, bool]:
    """Hardware → whether it loads there, with these packages beside it."""
    rows = [x for x in found.engines if x.engine.startswith(engine)]
    return {x.where: x.loads for x in rows if not install or x.install == install}


@pytest.mark.parametrize(
    ("changes", "gpus", "hopper", "cpus"),
    [
        ((), True, True, True),
        (("bits=8",), True, True, False),
        (("bits=3",), False, False, False),
        (("activations=fp8",), False, True, False),
        (("group_size=16",), False, False, False),
        (("layers=*q_proj,*o_proj",), False, False, False),  # vLLM fuses q with k and v
    ],
)
def test_vllm_by_hardware(
    converted: Maker, changes: tuple[str, ...], gpus: bool, hopper: bool, cpus: bool
):
    found = loadings(converted("rtn", "llama", *changes))
    alone = [x for x in found.engines if x.engine == "vLLM 0.32" and x.install == ()]
    assert {x.where: x.loads for x in alone} == {TURING: gpus, HOPPER: hopper, CPU: cpus}
    plugged = hopper and not gpus  # inputs in FP8
    assert told(found, "vLLM", PLUGIN) == ({ADA: True, CPU: True} if plugged else {})
    assert told(found, "transformers") == {"any device": True}
    assert told(found, "llama.cpp") == {"any device": False}
    for one in found.engines:
        assert one.loads or one.notes, one
    wanted = "loads in: transformers 5.24 with compressed-tensors"
    if gpus or hopper or cpus:
        where = "" if cpus else f" on {TURING if gpus else HOPPER}"
        wanted += f"; vLLM 0.32{where}"
    if plugged:
        wanted += f"; vLLM 0.32 with {PLUGIN} on {ADA} and {CPU}"
    assert found.line == wanted


def test_experts_need_amx_on_cpus(converted: Maker):
    found = loadings(converted("rtn", "qwen2_moe"))
    assert told(found, "vLLM") == {TURING: True, HOPPER: True, CPU: False}
    assert any("AMX" in note for x in found.engines for note in x.notes)
    assert told(found, "transformers") == {"any device": True}
    apart = loadings(converted("rtn", "qwen2_moe", "ignore=*.experts.*"))
    assert told(apart, "transformers") == {"any device": False}  # stock; with pq in format pq
    assert told(apart, "vLLM") == {TURING: True, HOPPER: True, CPU: True}


def test_other_formats(tiny: Maker, converted: Maker, tmp_path: Path):
    plain = loadings(tiny("llama"))
    assert plain.line == "loads in: transformers 5.24; vLLM 0.32"
    native = loadings(converted("fireq-kv", "llama"))
    assert native.format == "pq"
    assert "transformers 5.24 with pq-quantize; vLLM 0.32 with pq-vllm" in native.line
    assert told(native, "vLLM") == {ADA: True, CPU: True}  # its cache multiplies E4M3
    others = tmp_path / "others"
    others.mkdir()
    for path in tiny("llama").iterdir():
        (others / path.name).write_bytes(path.read_bytes())
    config = json.loads((others / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (others / "config.json").write_text(json.dumps(config))
    found = loadings(others)
    assert found.line == "loads in: nothing that pq knows"
    assert "awq" in found.engines[0].notes[0]
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    assert loadings(tmp_path / "gguf").line == "loads in: llama.cpp"


def test_experts_of_a_class_that_the_plugin_does_not_know(tiny: Maker, tmp_path: Path):
    folder = tmp_path / "experts"
    shutil.copytree(tiny("llama"), folder)
    path = folder / "config.json"
    routing: dict[str, Policy] = {"model.layers.0.mlp": TopK(1)}
    sizes = {"n": 2, "size": 32, "shared": 64}
    config = json.loads(path.read_text())
    section = native_config({}, [], None, (), routing, sizes)
    path.write_text(json.dumps(config | {"quantization_config": section}))
    assert told(loadings(folder), "vLLM") == {AMPERE: True, CPU: True}
    odd = {"quantization_config": section, "architectures": ["OlmoForCausalLM"]}
    path.write_text(json.dumps(config | odd))
    found = loadings(folder)
    assert told(found, "vLLM") == {AMPERE: False, CPU: False}
    assert any(note.endswith("this is OlmoForCausalLM") for x in found.engines for note in x.notes)


@pytest.mark.parametrize(
    ("where", "capabilities"),
    [(TURING, (7.5, 8.0, 8.9, 9.0, 10.0)), (ADA, (8.9, 9.0, 10.0)), (HOPPER, (9.0,)), (CPU, ())],
)
def test_which_gpus_a_name_means(where: str, capabilities: tuple[float, ...]):
    every = (7.0, 7.5, 8.0, 8.9, 9.0, 10.0)
    assert tuple(x for x in every if runs_on(where, x)) == capabilities


def test_the_screen(pq: Call, converted: Maker):
    folder = converted("rtn", "llama", "activations=fp8")
    code, out, _ = pq("serve-check", folder, "--context", 200, "--sequences", 3)
    assert code == 0
    own = [line for line in out.splitlines() if str(folder) not in line]
    assert max(map(len, own)) <= 80
    assert f"vllm serve {shlex.quote(str(folder))} --max-model-len 200 --max-num-seqs 3" in out
    assert re.search(r"^yes vLLM 0.32 +H100 and H200 +in bfloat16$", out, re.M)
    assert re.search(r"^no  vLLM 0.32 +CPUs$", out, re.M)
    # Keys and values of 2 heads of 64 channels in 2 layers, 16 bits each.
    assert f"{2 * 2 * 64 * 2 * 2 * 600 / 1e6:.1f} MB of KV cache for 3 × 200 tokens" in out
    assert re.search(rf"^yes vLLM 0.32 +{ADA} +pip install pq-vllm$", out, re.M)
    fitting = out[out.index("fits 1 ×") :]
    assert all(gpu in fitting for gpu in ("h100-sxm", "h200-sxm", "l4"))
    assert "a100" not in out


def test_everything_as_json(pq: Call, converted: Maker):
    folder = converted("fireq-kv", "llama")
    code, out, _ = pq("serve-check", folder, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["loads_in"].startswith("loads in: ")
    assert facts["commands"]["transformers"][0] == "import quantize"
    on_gpus, on_cpus = facts["commands"]["vLLM"]
    assert on_gpus.endswith(" --attention-backend CUSTOM")
    assert "--attention-backend" not in on_cpus
    code, _, err = pq("serve-check", folder, "--kv-cache", "fp8")
    assert code == 2
    assert "--kv-cache fp8" in err
    served = served_model(folder)
    assert facts["memory"]["context"] == 256  # what config.json allows for
    assert facts["memory"]["weights"] == served.weights()
    assert facts["memory"]["kv"] == round(8 * served.kv_bytes(256))
    by_name = {gpu["gpu"]: gpu for gpu in facts["gpus"]}
    assert by_name["l4"]["count"] == 1
    assert by_name["l4"]["per_gpu"]["total"] == gpu_named("l4").memory_bytes


def test_what_fits_no_gpu_says_so(pq: Call, converted: Maker):
    folder = converted("rtn", "llama")
    code, out, _ = pq("serve-check", folder, "--context", 10**9)
    assert code == 0
    assert "not on 8 of " in out
    few = json.loads(pq("serve-check", folder, "--context", 10**8, "--sequences", 1, "--json")[1])
    by_name = {gpu["gpu"]: gpu["count"] for gpu in few["gpus"]}
    # 1024 bytes a token are 102 GB, of 2 heads that two GPUs share and more repeat.
    assert by_name["b200-sxm"] == 1
    assert by_name["h100-sxm"] == 2
    assert by_name["l4"] is None
    assert "--tensor-parallel-size" not in few["commands"]["vLLM"][0]


def test_commands_end_with_the_short_form(pq: Call, tiny: Maker, tmp_path: Path):
    model, output = tiny("llama"), tmp_path / "out"
    code, _, err = pq("convert", "-m", model, "-r", "rtn", "-o", output, "--set", "bits=8")
    line = f"loads in: transformers 5.24 with compressed-tensors; vLLM 0.32 on {TURING}"
    assert code == 0
    assert line in err
    assert pq("inspect", output)[1].splitlines()[-1] == line
    assert json.loads(pq("inspect", output, "--json")[1])["loads_in"] == line
