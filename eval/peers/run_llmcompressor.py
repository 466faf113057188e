"""GPTQ of llm-compressor on given windows of tokens; runs in an environment of its own, see eval/bench_peers.py.

python run_llmcompressor.py MODEL WINDOWS.json OUTPUT
"""

import json
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

parent, windows, output = sys.argv[1:]
with open(windows) as file:
    tokens = json.load(file)
model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
oneshot(
    model=model,
    dataset=Dataset.from_dict(
        {"input_ids": tokens, "attention_mask": [[1] * len(w) for w in tokens]}
    ),
    recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
    max_seq_length=len(tokens[0]),
    num_calibration_samples=len(tokens),
)
model.save_pretrained(output, save_compressed=True)
AutoTokenizer.from_pretrained(parent).save_pretrained(output)
