"""pq's outputs in a real vLLM, against transformers on the same checkpoints; `make test-vllm` runs it.

pq converts here, and vLLM (its CPU build) serves from an environment of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES, ModelMaker
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantize.conversion.loop import Request, convert
from quantize.files.checkpoint import Checkpoint
from quantize.formats.engines import CPU
from quantize.formats.fp8 import e4m3, reloaded, row_factor
from quantize.formats.registry import schemes_in
from quantize.inspect.engines import loadings
from quantize.plan.kv import KV_TYPES
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import load_recipe
from quantize.solvers.grid import Grid

HERE = Path(__file__).resolve().parent
REFERENCE = HERE.parents[1] / "eval" / "reference-model"
ENVIRONMENT = "PQ_VLLM"
SERVED = {
    "rtn": ("reference", "rtn", ()),
    "negative scales": ("reference", "fireq-linear", ("activations=none",)),
    "attention of a MoE": ("moe", "rtn", ("ignore=*.experts.*",)),
}
REFUSED = {
    "8 bits": ("reference", "rtn", ("bits=8",)),
    "3 bits": ("reference", "rtn", ("bits=3",)),
    "FP8 inputs": ("reference", "rtn", ("activations=fp8",)),
    "fused layers differ": ("reference", "rtn", ("layers=*q_proj",)),
    "experts without AMX": ("moe", "rtn", ()),
}
_SECONDS = 2400
"""Until the engine has answered, on a machine that others use as well."""


@pytest.fixture(scope="session")
def engine() -> Path:
    """The Python of vLLM's environment."""
    folder = os.environ.get(ENVIRONMENT)
    if not folder:
        pytest.skip(f"{ENVIRONMENT} names no environment of vLLM; make test-vllm does")
    return Path(folder).absolute() / "bin/python"


def run(engine: Path, script: str, *args: Path) -> str:
    """What a script of this folder prints, run by vLLM's Python without anything of pq."""
    done = subprocess.run(
        [str(engine), str(HERE / script), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env=surroundings(),
        cwd="/",
        timeout=_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def surroundings() -> dict[str, str]:
    """Variables of a process of vLLM: offline, in one process, on whatever cores are free."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON", "PQ_"))}
    return own | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def parents(tiny: ModelMaker) -> dict[str, Path]:
    """What is converted. vLLM takes heads of this type to have hidden / heads channels, whatever
    config.json says, and computes something else of others."""
    moe = tiny("qwen2_moe", num_attention_heads=2, num_key_value_heads=2)
    return {"reference": REFERENCE, "moe": moe}


@pytest.fixture(scope="session")
def folders(parents: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Parents and everything converted, by name."""
    root = tmp_path_factory.mktemp("served")
    out = dict(parents)
    for name, (parent, recipe, changes) in (SERVED | REFUSED).items():
        text = root / "text.txt"
        text.write_text("\n".join(SENTENCES * 40), encoding="utf-8")
        asked = load_recipe(recipe).with_overrides(str(text), nsamples=8, seqlen=64)
        chosen = with_stage_fields(asked, changes)
        out[name] = root / name.replace(" ", "-")
        convert(Request(parents[parent], chosen, out[name], torch.device("cpu"), torch.float32))
    return out


def windows_of(folder: Path) -> list[list[int]]:
    """Four windows of text as this model's tokenizer cuts it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text * 2).input_ids[:48] for text in SENTENCES]


def decoded(folder: Path, parent: Path) -> torch.nn.Module:
    """The parent with the weights that the packed linears stand for: stock transformers does not load
    experts of which nothing is packed beside linears that are."""
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    source = Checkpoint(folder)
    names = [
        name.removesuffix(".weight_packed") for name in source.names() if "weight_packed" in name
    ]
    for name, scheme in schemes_in(source.config["quantization_config"], names).items():
        stored = {part: source.tensor(f"{name}.{part}") for part in scheme.suffixes}
        model.get_submodule(name).weight.data = scheme.read(stored).unpack()
    return model


def stock_logprobs(folder: Path, parent: Path | None = None) -> list[torch.Tensor]:
    """Of every token but the first, by transformers in float32. parent: that of packed linears which
    are to be decoded first."""
    if parent is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        model = decoded(folder, parent).eval()
    out = []
    with torch.inference_mode():
        for window in windows_of(folder):
            tokens = torch.tensor(window)
            found = model(tokens[None]).logits[0, :-1].float().log_softmax(dim=-1)
            out.append(found.gather(1, tokens[1:, None])[:, 0])
    return out


@pytest.fixture(scope="session")
def answers(
    engine: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What one run of the real engine says of all of them, in bfloat16."""
    asked = {name: [str(f), "bfloat16", windows_of(f)] for name, f in folders.items()}
    file = tmp_path_factory.mktemp("asked") / "asked.json"
    file.write_text(json.dumps(asked), encoding="utf-8")
    lines = run(engine, "vllm_engine.py", file).splitlines()
    found = [json.loads(x.removeprefix("FOUND ")) for x in lines if x.startswith("FOUND ")]
    return {one["model"]: one for one in found}


def distance(found: list[list[float]], wanted: list[torch.Tensor]) -> float:
    """Mean |Δ| of log probabilities."""
    assert [len(x) for x in found] == [len(x) for x in wanted]
    flat = torch.tensor([value for window in found for value in window])
    return float((flat - torch.cat(wanted)).abs().mean())


@pytest.mark.parametrize("name", SERVED)
def test_logprobs_are_those_of_transformers(
    name: str, folders: dict[str, Path], answers: dict[str, dict[str, Any]]
):
    """Within 1.5 times what bfloat16 alone does to the parent."""
    parent = SERVED[name][0]
    own = distance(answers[parent]["logprobs"], stock_logprobs(folders[parent]))
    assert "logprobs" in answers[name], answers[name]
    wanted = stock_logprobs(folders[name], folders[parent] if parent == "moe" else None)
    apart = distance(answers[name]["logprobs"], wanted)
    assert 0 < own < 0.2  # of random weights more than of trained ones
    assert apart <= 1.5 * own, (apart, own)
    assert any(x.loads and x.where == CPU for x in loadings(folders[name]).engines)


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_was_announced(
    name: str, folders: dict[str, Path], answers: dict[str, dict[str, Any]]
):
    """`pq convert` and `pq inspect` say so by the same table."""
    if "AMX" in name and "amx" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this processor has AMX, with which vLLM takes them")
    (told,) = [x for x in loadings(folders[name]).engines if x.where == CPU and not x.install]
    assert "refused" in answers[name], answers[name]
    assert not told.loads
    assert told.notes


@contextmanager
def server(command: list[str], port: int) -> Iterator[str]:
    """A process that serves on 127.0.0.1, ended with all that it started."""
    with subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=surroundings() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield wait_for(process, f"http://127.0.0.1:{port}")
        finally:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[str], address: str) -> str:
    """The address, once it answers."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"vllm serve ended: {process.communicate()[0][-2000:]}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return address
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vllm serve did not answer in {_SECONDS} s")


def test_the_command_of_serve_check_serves(
    engine: Path, folders: dict[str, Path], pq: Callable[..., tuple[int, str, str]]
):
    """Word for word, and the OpenAI API gives the same log probabilities."""
    folder = folders["rtn"]
    facts = json.loads(pq("serve-check", folder, "--context", 64, "--sequences", 2, "--json")[1])
    words = shlex.split(facts["commands"]["vLLM"][0])
    assert words[:2] == ["vllm", "serve"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = ["--enforce-eager", "--kv-cache-memory-bytes", "100000000"]
    command = [str(engine.parent / "vllm"), *words[1:], *small]
    windows = windows_of(folder)
    with server(command, port) as address:
        asked = {"model": str(folder), "prompt": windows[0], "max_tokens": 1, "prompt_logprobs": 0}
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            found = json.loads(answer.read())["choices"][0]["prompt_logprobs"]
    logprobs = [found[i][str(t)]["logprob"] for i, t in enumerate(windows[0]) if i]
    assert distance([logprobs], stock_logprobs(folder)[:1]) < 0.05


@pytest.mark.parametrize("name", ["reference", "rtn", "FP8 inputs", "INT4 cache"])
def test_vllms_own_parser_takes_the_commands(
    name: str,
    engine: Path,
    folders: dict[str, Path],
    converted: Callable[..., Path],
    pq: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
):
    """With every type of KV cache that pq counts, each option means what was asked for."""
    folder = converted("fireq-kv", "llama") if name == "INT4 cache" else folders[name]
    asked: dict[str, Any] = {}
    types = {"auto": "auto"} | {kind.name: kind.vllm or "auto" for kind in KV_TYPES}
    for kind in types:
        words = ["--context", 48, "--sequences", 3, "--kv-cache", kind, "--json"]
        code, out, _ = pq("serve-check", folder, *words)
        if code == 0:  # a checkpoint with a cache of its own has no other
            for index, line in enumerate(json.loads(out)["commands"]["vLLM"]):
                asked[f"{kind} {index}"] = shlex.split(line, comments=True)[2:]
    assert len(asked) > 1
    (tmp_path / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    found = json.loads(run(engine, "vllm_parser.py", tmp_path / "asked.json").splitlines()[-1])
    assert found.keys() == asked.keys()
    for key, words in asked.items():
        took, kind = found[key], key.split()[0]
        assert took["model_tag"] == str(folder)
        assert (took["max_model_len"], took["max_num_seqs"]) == (48, 3)
        assert took["tensor_parallel_size"] == 1
        assert took["kv_cache_dtype"] == types[kind], words
        assert took["dtype"] in ("auto", "bfloat16")
        plugged = name == "INT4 cache" and key.endswith(" 0")
        assert ("CUSTOM" in str(took["attention_backend"])) == plugged


@pytest.mark.parametrize("signed", [False, True])
def test_the_twin_of_vllms_scales(signed: bool, engine: Path, tmp_path: Path):
    """Codes and factors that vLLM's own function derives, of whole rows and of shards."""
    w = torch.randn(64, 4096) * torch.randn(4096).mul(0.5).exp() * 0.02
    grids = {
        "exact": Grid(4, 128, fp8_scales=True, shards=(2, 4, 8), signed=signed),
        "one GPU": Grid(4, 128, fp8_scales=True, signed=signed),
        "bfloat16": Grid(4, 128, signed=signed),
    }
    scales = {name: grid.fit_scale(w)[0].to(torch.bfloat16) for name, grid in grids.items()}
    assert all(bool((scale < 0).any()) == signed for scale in scales.values())
    asked = {
        f"{name}.{count}": scale.reshape(64 * count, -1).clone()
        for name, scale in scales.items()
        for count in (1, 2, 4, 8)
    }
    save_file(asked, tmp_path / "in.safetensors")
    run(engine, "vllm_scales.py", tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    for key, scale in asked.items():
        name, _, count = key.rpartition(".")
        factor = row_factor(scale)
        codes = e4m3(e4m3(scale.float() / factor) / 8)
        assert torch.equal(out[f"{key}.factor"], 8 * factor), key
        # Theirs multiplies by a reciprocal, which may fall on the other side of a tie, but not where
        # scales are made to be found again.
        found_again = name == "exact" or (name == "one GPU" and count == "1")
        other = float((out[f"{key}.codes"] != codes).float().mean())
        assert other == 0 if found_again else other < 2e-3, key
        stored = scales[name]
        again = (8 * codes * factor).to(torch.bfloat16).view_as(stored)
        fine = codes.view_as(stored).abs() >= 2.0**-6  # below, eighths are subnormal
        same = torch.equal(again[fine], stored[fine])
        assert same == torch.equal(reloaded(stored, int(count)), stored), key
        assert same == found_again, key
