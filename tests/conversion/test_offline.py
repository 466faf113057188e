"""Nothing but a Hub id touches the network: a whole round of commands in a process that is told of every attempt."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import COMMON, ModelMaker
from hostile import Call, edit_config

SCRIPT = """
import json, sys
met = []

def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr",
                 "socket.sendto", "socket.sendmsg"):
        met.append([event, repr(args)])
        raise OSError("this process has no network")

sys.addaudithook(hook)
from quantize.cli import main

codes = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["pq", *command]
    try:
        main()
    except SystemExit as left:
        codes.append(left.code or 0)
with open("met.json", "w") as file:
    json.dump([codes, met], file)
"""


def run(commands: list[list[str]], folder: Path) -> tuple[list[int], list[list[str]]]:
    """Run `pq` commands in one new process → exit codes, attempts at the network."""
    # Without the variables that let the Hub's libraries stay at home of their own accord, and with an empty cache.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
    environment |= {"HOME": str(folder), "HF_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    codes, met = json.loads((folder / "met.json").read_text())
    return codes, met


def test_local_models_never_touch_the_network(tiny: ModelMaker, tmp_path: Path):
    model = str(shutil.copytree(tiny("llama"), tmp_path / "model"))
    greedy = str(_sends_for_code(shutil.copytree(tiny("llama"), tmp_path / "greedy")))
    cpu, few = ["--device", "cpu"], ["--max-windows", "2", "--seqlen", "32"]
    commands = [
        [
            "convert",
            "-m",
            model,
            "-r",
            "gptq",
            "-o",
            "out",
            "--nsamples",
            "2",
            "--seqlen",
            "32",
            *cpu,
        ],
        ["eval", "out", "--baseline", model, *few, *cpu],
        ["eval", "out", "--tasks", "multiple_choice:quiz.jsonl", "--limit", "1", *cpu],
        ["verify", "out", "--parent", model],
        ["inspect", "out"],
        ["report", "out"],
        [
            "convert",
            "-m",
            greedy,
            "-r",
            "gptq",
            "-o",
            "again",
            "--nsamples",
            "2",
            "--seqlen",
            "32",
            *cpu,
        ],
        ["eval", greedy, *few, *cpu],
    ]
    (tmp_path / "quiz.jsonl").write_text(
        json.dumps({"id": 0, "query": "One?", "choices": ["a", "b"], "gold": 0})
    )
    codes, met = run(commands, tmp_path)
    assert met == []
    assert codes == [0] * len(commands)


def _sends_for_code(model: Path) -> Path:
    """Fields by which transformers may be led to the Hub."""
    other = "someone/code"
    edit_config(
        model,
        attn_implementation=other,
        _attn_implementation=other,
        use_kernels=True,
        name_or_path=other,
    )
    edit_config(model, _name_or_path=other, kernel_config={"RMSNorm": f"{other}:Norm"})
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"name_or_path": other}))
    return model


def test_the_hook_sees_what_it_must(tmp_path: Path):
    codes, met = run([["inspect", "no-such-org/no-such-model"]], tmp_path)
    assert codes == [4]
    assert met


# Code beside the weights


@pytest.fixture
def armed(tiny: ModelMaker, tmp_path: Path) -> Callable[..., Path]:
    """A model with a module beside its weights that leaves a file behind when it runs."""

    def make(source: Path) -> Path:
        model = Path(shutil.copytree(source, tmp_path / "model"))
        code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass X: pass\nConfig = Model = Tokenizer = X\n"
        for name in ("modeling_x.py", "__init__.py", "torch.py", "conftest.py"):
            (model / name).write_text(code)
        return model

    return make


CONFIG_MAP = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
TOKENIZER_MAP = {"AutoTokenizer": ["modeling_x.Tokenizer", "modeling_x.Tokenizer"]}


# Who would run it is settled by the type and by each of these places; all of them meet in the one of every type.
PLACES = ["config", "tokenizer", "tokenizer and its class"]
PLACED = [
    *(("llama", [place]) for place in PLACES),
    *((each, PLACES[:2]) for each in COMMON),
]


@pytest.mark.parametrize(("model_type", "places"), PLACED)
def test_code_beside_the_weights_never_runs(
    pq: Call,
    armed: Callable[..., Path],
    converted: ModelMaker,
    tiny: ModelMaker,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    places: list[str],
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    text = ["--dataset", text_file, "--seqlen", 32, "--device", "cpu"]
    for source in (tiny("llama"), converted("gptq", "llama")):
        model = armed(source)
        edit_config(model, model_type=model_type)
        if "config" in places:
            edit_config(model, auto_map=CONFIG_MAP | TOKENIZER_MAP)
        if places != ["config"]:
            path = model / "tokenizer_config.json"
            tokenizer = json.loads(path.read_text()) | {"auto_map": TOKENIZER_MAP}
            own_class = {"tokenizer_class": "Tokenizer"} if PLACES[2] in places else {}
            path.write_text(json.dumps(tokenizer | own_class))
        for command in (
            ["convert", "-m", model, "-r", "gptq", "-o", tmp_path / "out", "--nsamples", 4, *text],
            ["eval", model, "--max-windows", 1, *text],
            ["verify", model, "--parent", model],
            ["inspect", model],
            ["report", model],
        ):
            code, _, err = pq(*command)
            assert code in (0, 4, 5, 7), err
            assert not (tmp_path / "ran").exists(), command
        assert not list((tmp_path / "cache").rglob("*.py"))
        for path in (model, tmp_path / "out", tmp_path / "model.eval"):
            shutil.rmtree(path, ignore_errors=True)
