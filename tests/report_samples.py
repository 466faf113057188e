"""Folders as a conversion and its evaluations leave them, made up from seeded numbers."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from rows import architecture_of
from safetensors.torch import save_file

from quantize.formats.compressed_tensors import quantization_config
from quantize.formats.packed_int import IntScheme
from quantize.recipe.recipe import load_recipe, resolved_yaml
from quantize.report import Report, as_json

LLAMA = architecture_of({"model_type": "llama"})
LINEARS = tuple(LLAMA.roles)
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&$x^2$\u202e\x00\x1b[31m"


def provenance(blocks: int, recipe: str = "fireq") -> dict[str, Any]:
    rng = random.Random(blocks)
    layers: dict[str, dict[str, Any]] = {}
    for i in range(blocks):
        for edge in LLAMA.edges:
            layers[f"model.layers.{i}.{edge.name}"] = {"search_ratio": rng.uniform(0.1, 1.0)}
        for name in LINEARS:
            error = (
                0.003
                * math.exp(rng.gauss(0, 0.5))
                * (1 + i / blocks)
                * (3 if "down" in name else 1)
            )
            layers[f"model.layers.{i}.{name}"] = {
                "damping": 0.1,
                "dead_inputs": 0,
                "weight_error": rng.uniform(0.012, 0.03),
                "output_error": error,
            }
    return {
        "pq": "0.1.0",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"device": "cpu", "dtype": "float32"},
        "recipe": {"name": recipe, "resolved": resolved_yaml(load_recipe(recipe))},
        "source": {"config.json": "c1" * 32, "model.safetensors": "68" * 32},
        "calibration": {
            "sha256": "94" * 32,
            "dataset": "builtin",
            "nsamples": 128,
            "seqlen": 512,
            "seed": 0,
        },
        "bits_per_weight": 4.125,
        "dropped_sequences": 0,
        "layers": layers,
        "files": {"config.json": "ab" * 32},
    }


def statistics(blocks: int) -> dict[str, Any]:
    rng = random.Random(blocks + 1)

    def inputs(ratio: float) -> dict[str, Any]:
        absmax = 2.0 * ratio
        top = [[rng.randrange(256), absmax / (k + 1)] for k in range(8)]
        return {"absmax": absmax, "p99": 4.0, "median": 2.0, "tokens": 65536, "top": top}

    def weights(ratio: float) -> dict[str, Any]:
        return {"absmax": 0.05 * ratio, "rms": 0.05, "kurtosis": 3.5}

    out: list[dict[str, Any]] = []
    for i in range(blocks):
        groups = {
            group[0]: {"before": inputs(rng.uniform(20, 90)), "after": inputs(rng.uniform(3, 9))}
            for group in LLAMA.calibration_order
        }
        linears = {
            n: {"before": weights(rng.uniform(5, 9)), "after": weights(rng.uniform(6, 14))}
            for n in LINEARS
        }
        out.append({"index": i, "inputs": groups, "weights": linears})
    edges = [-12 + 24 * k / 96 for k in range(97)]
    counts = [int(1e6 * math.exp(-(((edges[k] + 0.125) / 3.1) ** 2) / 2)) for k in range(96)]
    roles = LLAMA.roles.values()
    histograms = {
        f"{r}/4": {"role": r, "bits": 4, "group_size": 128, "edges": edges, "counts": counts}
        for r in roles
    }
    return {"blocks": out, "histograms": histograms}


def evaluation(name: str = "demo", **changes: Any) -> dict[str, Any]:
    start = [0, 1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448]
    parent = [9.1 - 0.55 * math.log2(1 + s) for s in start]
    worst = [
        {
            "window": 3 * k,
            "position": 17 + 29 * k,
            "before": "which was then presented to the council on the afternoon of the ",
            "token": [" twelfth", "\n", " 量子", " naïve"][k % 4],
            "after": " of May, although nobody had asked for it\nand nobody read it.",
            "kld": 3.2 / (k + 1),
            "nll": 5.1,
            "baseline_nll": 1.3,
            "top1": " first",
            "baseline_top1": [" twelfth", "\n", " 量子", " naïve"][k % 4],
        }
        for k in range(20)
    ]
    return {
        "kind": "perplexity",
        "model": name,
        "baseline": "yardstick",
        "protocol": "strided-512",
        "data": "wikitext2-test.txt",
        "data_sha256": "17" * 32,
        "numerics": "kernel",
        "dtype": "float32",
        "windows": 60,
        "tokens": 30660,
        "context": 0,
        "perplexity": 88.17,
        "baseline_perplexity": 87.80,
        "nll_stderr": 0.0163,
        "delta_nll": 0.0042,
        "delta_nll_stderr": 0.00055,
        "word_perplexity": None,
        "byte_perplexity": None,
        "bits_per_byte": None,
        "baseline_word_perplexity": None,
        "baseline_byte_perplexity": None,
        "baseline_bits_per_byte": None,
        "kld_mean": 0.0045,
        "kld_stderr": 0.00004,
        "kld_median": 0.0029,
        "kld_p90": 0.0091,
        "kld_p99": 0.0281,
        "kld_p999": 0.0811,
        "top1_agreement": 0.944,
        "top1_stderr": 0.0013,
        "bits_per_weight": 4.125,
        "by_position": {
            "start": start,
            "nll": [v + 0.004 for v in parent],
            "baseline_nll": parent,
            "kld": [0.006 - 0.0001 * k for k in range(len(start))],
        },
        "worst": worst,
        "kld_histogram": {
            "edges": [10 ** (k / 4 - 6) for k in range(33)],
            "counts": [0] * 6
            + [round(9000 * math.exp(-(((k - 15) / 4) ** 2))) for k in range(20)]
            + [0] * 6,
        },
    } | changes


def rolling(**changes: Any) -> dict[str, Any]:
    figures = {"word_perplexity": 412.5, "byte_perplexity": 2.31, "bits_per_byte": 1.208}
    parents = {f"baseline_{key}": 0.995 * value for key, value in figures.items()}
    return evaluation(protocol="rolling-512", numerics="stock", **figures, **parents, **changes)


def task_run() -> dict[str, Any]:
    score = {
        "value": 0.412,
        "stderr": 0.021,
        "baseline": 0.418,
        "baseline_stderr": 0.021,
        "difference": -0.006,
    }
    score |= {
        "difference_stderr": 0.009,
        "recovery": 0.986,
        "recovery_stderr": 0.021,
        "n": 500,
        "paired": True,
    }
    return {
        "kind": "tasks",
        "model": "demo",
        "num_fewshot": None,
        "limit": 500,
        "chat_template": False,
        "numerics": "kernel",
        "dtype": "float32",
        "versions": {"lm_eval": "0.4.13"},
        "tasks": {"arc_easy": {"acc": {"value": 0.412, "stderr": 0.021, "higher_is_better": True}}},
        "n_samples": {"arc_easy": 500},
        "scores": [
            {"task": t, "metric": m, **score}
            for t in ("arc_easy", "piqa")
            for m in ("acc", "acc_norm")
        ],
    }


def write_checkpoint(folder: Path, blocks: int, **changes: Any) -> Path:
    """Write a folder of tiny tensors with the names of a packed llama, and its pq.json."""
    folder.mkdir(parents=True)
    names = [f"model.layers.{i}.{name}" for i in range(blocks) for name in LINEARS]
    schemes = {name: IntScheme(4, 128, True) for name in names}
    tensors = {"model.embed_tokens.weight": torch.zeros(32, 128, dtype=torch.bfloat16)}
    for name in names:
        tensors[f"{name}.weight_packed"] = torch.zeros(2, 16, dtype=torch.int32)
        tensors[f"{name}.weight_scale"] = torch.ones(2, 1, dtype=torch.bfloat16)
        tensors[f"{name}.weight_shape"] = torch.tensor([2, 128])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sizes = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": blocks,
        "vocab_size": 32,
    }
    config = {
        "model_type": "llama",
        **sizes,
        "quantization_config": quantization_config(schemes, ["lm_head"]),
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "pq.json").write_text(json.dumps(provenance(blocks) | changes), encoding="utf-8")
    return folder


def add_everything(folder: Path, blocks: int) -> Path:
    """Write statistics into, and a log and evaluations beside, a checkpoint."""
    (folder / "pq-statistics.json").write_text(json.dumps(statistics(blocks)), encoding="utf-8")
    results = folder.with_name(folder.name + ".eval")
    results.mkdir()
    saved = {
        "strided-512-wikitext": evaluation(folder.name),
        "rolling-512-wikitext": rolling(),
        "tasks-a": task_run(),
    }
    for name, data in saved.items():
        (results / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    summary = json.dumps({"seconds": 88.7, "source_bytes": 10, "output_bytes": 5})
    log = folder.with_name(folder.name + ".log")
    log.write_text(f"2026-01-01 00:00:00 INFO summary {summary}\n", encoding="utf-8")
    return folder


def save(folder: Path, name: str, data: Any) -> None:
    results = folder.with_name(folder.name + ".eval")
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")


def section(report: Report, identity: str) -> dict[str, Any]:
    return next(s for s in as_json(report)["sections"] if s["id"] == identity)


def titled(report: Report, identity: str, title: str) -> dict[str, Any]:
    return next(i for i in section(report, identity)["items"] if i.get("title") == title)


def titles(report: Report, identity: str) -> list[str]:
    return [item.get("title", item["kind"]) for item in section(report, identity)["items"]]


def headlines(report: Report) -> dict[str, float | None]:
    return {headline.label: headline.number for headline in report.headlines}


class Page(HTMLParser):
    """Tags with their attributes and the text outside style sheets; insists that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]
