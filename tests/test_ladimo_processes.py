"""Teaching shared by several processes of accelerate gives what one process gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ModelMaker
from safetensors.torch import load_file

STAGE = (
    "{method: ladimo, policy: top-k, mean_experts: [1, null], shared: 128, experts: 2, steps: 6, batch_tokens: 32,"
    " passes: 100}"
)


def launch(processes: int, folder: Path, model: Path, recipe: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        "-c",
        "from quantize.cli import main; main()",
        "convert",
        "-m",
        str(model),
        "-r",
        str(recipe),
        "-o",
        str(folder),
    ]
    command += ["--device", "cpu", "--dtype", "float32"]
    running = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        told = ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        several = told | {"ACCELERATE_USE_CPU": "true"} if processes > 1 else {}
        running.append(subprocess.Popen(command, env=os.environ | several, stderr=subprocess.PIPE, text=True))
    for one in running:
        _, said = one.communicate(timeout=300)
        assert one.returncode == 0, said


def test_two_processes_teach_what_one_does(tiny: ModelMaker, text_file: Path, tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"description: d\ncalibration: {{dataset: {text_file}, nsamples: 6, seqlen: 32}}\nstages: [{STAGE}]\n"
    )
    for processes in (1, 2):
        launch(processes, tmp_path / f"out{processes}", tiny("llama"), recipe)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out1", "out2"]
    for path in sorted((tmp_path / "out1").glob("*.safetensors")):
        one, two = load_file(path), load_file(tmp_path / "out2" / path.name)
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            # Sums over tokens come in another order; AdamW's first steps have the sign of the gradient.
            error = (tensor.double() - two[name].double()).norm() / tensor.double().norm().clamp_min(1e-9)
            assert error < 2e-2, name
    facts = [json.loads((tmp_path / f"out{n}/pq.json").read_text())["layers"] for n in (1, 2)]
    first, second = (layers["model.layers.0.mlp"]["ffn_error"] for layers in facts)
    assert torch.isclose(torch.tensor(first), torch.tensor(second), rtol=0.02)
