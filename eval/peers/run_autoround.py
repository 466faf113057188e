"""AutoRound on given windows of tokens; runs in an environment of its own, see eval/bench_peers.py.

    python run_autoround.py MODEL WINDOWS.json OUTPUT ITERATIONS

Writes weights with their rounding in 16 bits (`fake`), which every loader reads.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

parent, windows, output, iterations = sys.argv[1:]
with open(windows) as file:
    tokens = torch.tensor(json.load(file))
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
tool = AutoRound(
    AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32),
    AutoTokenizer.from_pretrained(parent),
    scheme="W4A16",
    iters=int(iterations),
    nsamples=len(rows),
    seqlen=tokens.shape[1],
    batch_size=8,
    dataset=DataLoader(rows, batch_size=8),
    device_map="cpu",
    enable_torch_compile=False,
)
# It writes into a folder of its own naming inside the one given.
tool.quantize_and_save(f"{output}.parts", format="fake")
(config,) = Path(f"{output}.parts").rglob("config.json")
shutil.move(config.parent, output)
