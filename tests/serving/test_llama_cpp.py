"""A real llama.cpp loads what `format: gguf` writes (`make test-gguf`)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, config_of, random_weights, save_model, save_side_files
from resumed import request
from transformers import AutoTokenizer

from quantize.conversion.loop import convert
from quantize.files.resources import data_dir
from quantize.model.load import load_model

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed; make test-gguf makes a place for it"
)
pytestmark = pytest.mark.slow

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True, "num_attention_heads": 2},
    "qwen3": {},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "sliding_window": 8,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
    },
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
REFERENCE = data_dir("eval") / "reference-model"
PLAIN = "format: gguf, stages: [{method: gguf, type: q8_0, rounding: nearest, layers: ['*.0.mlp.up_proj']}]"
"""All but one linear in F16, which llama.cpp multiplies as it is."""
TOKENS = torch.randint(2, 290, (96,), generator=torch.Generator().manual_seed(0))


def engine(folder: Path) -> Any:
    return llama_cpp.Llama(
        str(folder / "model.gguf"),
        n_ctx=256,
        n_batch=256,
        n_threads=1,
        logits_all=True,
        verbose=False,
    )


def log_probs(running: Any, tokens: list[int]) -> torch.Tensor:
    running.reset()
    running.eval(tokens)
    return torch.from_numpy(np.array(running.scores[: len(tokens)])).log_softmax(-1)


def divergence(folder: Path, tokens: torch.Tensor) -> float:
    """Mean KL of llama.cpp's predictions from those of pq's own reader in float32."""
    with torch.no_grad():
        ours = load_model(folder, CPU, torch.float32)(tokens[None]).logits[0].log_softmax(-1)
    theirs = log_probs(engine(folder), tokens.tolist())
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize("kind", [*FAMILIES, "llama3"])
def test_every_family_computes_what_pq_reads(kind: str, text_file: Path, tmp_path: Path):
    """One linear in blocks and the rest in F16: nothing but float16 differs, so that a row, a norm or
    a frequency in the wrong place would show."""
    sizes = {"rope_parameters": LLAMA3} if kind == "llama3" else FAMILIES[kind]
    config = config_of("llama" if kind == "llama3" else kind, **sizes)
    parent = save_model(tmp_path / "parent", config, random_weights(config))
    save_side_files(parent)
    convert(request(PLAIN, parent, text_file, tmp_path / "out"))
    assert divergence(tmp_path / "out", TOKENS) < 1e-4


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_blocks_compute_within_the_rounding_of_activations(
    kind: str, text_file: Path, tmp_path: Path
):
    """llama.cpp rounds what enters blocks to 8 bits in groups of 32, which costs a model with outliers more
    than four-bit weights do: its own Q8_0 errs by .037 on this one, and F16 by 6e-7."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    text = Path(str(torch.__file__)).read_text(encoding="utf-8")[:2000]
    tokens = torch.tensor(tokenizer(text).input_ids[:200])
    convert(request(PLAIN, REFERENCE, text_file, tmp_path / "plain"))
    own = tmp_path / "own"
    own.mkdir()
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    asked.allow_requantize = True
    sizes = [str(folder / "model.gguf").encode() for folder in (tmp_path / "plain", own)]
    assert llama_cpp.llama_model_quantize(*sizes, asked) == 0
    plainly, rounded = (log_probs(engine(f), tokens.tolist()) for f in (tmp_path / "plain", own))
    rounding = float((plainly.exp() * (plainly - rounded)).sum(-1).mean())
    body = (
        "format: gguf, head_bits: 8, embedding_bits: 8, "
        f"stages: [{{method: gguf, type: {kind}, rounding: nearest}}]"
    )
    convert(request(body, REFERENCE, text_file, tmp_path / "out"))
    assert divergence(tmp_path / "out", tokens) < 1.5 * rounding


def test_it_tokenizes_and_generates(text_file: Path, tmp_path: Path):
    convert(request(PLAIN, REFERENCE, text_file, tmp_path / "out"))
    running, tokenizer = engine(tmp_path / "out"), AutoTokenizer.from_pretrained(REFERENCE)
    for text in ("def main(args):\n    return 1234", "naïve  量子 isn't\n\n\tit?", " <s>x</s>"):
        wanted = tokenizer(text).input_ids
        assert running.tokenize(text.encode(), add_bos=True, special=True) == wanted, text
    prompt = tokenizer("import os\n\ndef main(").input_ids
    model = load_model(tmp_path / "out", CPU, torch.float32)
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0]
    found = running.create_completion(prompt, max_tokens=12, temperature=0)["choices"][0]["text"]
    assert tokenizer.decode(wanted[len(prompt) :])[:24] == found[:24]


def asked(address: str, body: dict[str, Any] | None = None) -> Any:
    """What a server on this machine answers, once it is there."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def test_the_command_of_serve_check_serves(
    pq: Callable[..., tuple[int, str, str]], text_file: Path, tmp_path: Path
):
    """Word for word, with llama.cpp's own server, which gives what the library gives."""
    server = shutil.which(os.environ.get("LLAMA_SERVER", "llama-server"))
    if server is None:
        pytest.skip("there is no llama-server; LLAMA_SERVER= names one")
    convert(request(PLAIN, REFERENCE, text_file, tmp_path / "out"))
    told = pq("serve-check", tmp_path / "out", "--context", 256, "--sequences", 2, "--json")[1]
    words = shlex.split(json.loads(told)["commands"]["llama.cpp"][0])
    assert words[0] == "llama-server"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "server.log"
    with (
        log.open("w") as written,
        subprocess.Popen([server, *words[1:], *place], stdout=written, stderr=written) as running,
    ):
        try:
            end = time.monotonic() + 300
            while True:
                assert running.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < end, log.read_text()[-2000:]
                try:
                    asked(f"http://127.0.0.1:{port}/health")
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.3)
            facts = asked(f"http://127.0.0.1:{port}/props")
            prompt = AutoTokenizer.from_pretrained(REFERENCE)("import os\n\ndef main(").input_ids
            body = {"prompt": prompt, "n_predict": 12, "temperature": 0}
            found = asked(f"http://127.0.0.1:{port}/completion", body)["content"]
        finally:
            running.terminate()
    assert facts["total_slots"] == 2
    assert facts["default_generation_settings"]["n_ctx"] == 256
    wanted = engine(tmp_path / "out").create_completion(prompt, max_tokens=12, temperature=0)
    assert wanted["choices"][0]["text"][:24] == found[:24]
