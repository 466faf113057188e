"""Our GGUF files beside llama.cpp's own quantizations of the same model, all run by llama.cpp itself.

    python eval/gguf_accuracy.py --model DIR --calibration FILE --text FILE --work DIR --output eval/results/gguf.json

Needs llama-cpp-python (`make test-gguf` makes an environment with it). For each model: the unquantized file in F16,
our recipes, and llama.cpp's types with and without an importance matrix (mean squares of the inputs of each linear,
measured on the very text that ours are calibrated on). Embedding and head are Q8_0 in all of them, so that the bits
of the blocks' linears are what differs. Perplexity and KLD against the F16 file, in one process, on the same windows.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import measuring  # the script beside this one
import numpy as np
import torch
from torch import nn

from quantize.calibration.bos import bos_of
from quantize.calibration.tokens import calibration_tokens, evaluation_tokens
from quantize.conversion.loop import Request, convert
from quantize.files.checkpoint import Checkpoint
from quantize.files.gguf.encoding import GgufFile
from quantize.files.writer import CheckpointWriter
from quantize.formats.gguf.families import family_of
from quantize.formats.gguf.format import describe
from quantize.model.load import load_model
from quantize.model.tokenizer import load_tokenizer
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import Recipe, load_recipe

FILE = "model.gguf"
Q8_0 = 8
OURS: Mapping[str, tuple[str, list[str]]] = {
    "pq gguf-q4_0": ("gguf-q4_0", []),
    "pq gguf-q4_1": ("gguf-q4_1", []),
    "pq fireq-linear, W4A16 g128 as Q4_0": ("fireq-linear", ["activations=none"]),
}
"""Rows of ours: name → recipe, and fields that are set."""
THEIRS: Mapping[str, tuple[int, bool]] = {
    "llama.cpp Q4_0": (2, False),
    "llama.cpp Q4_0, imatrix": (2, True),
    "llama.cpp Q4_1, imatrix": (3, True),
    "llama.cpp Q4_K_S, imatrix": (14, True),
    "llama.cpp Q4_K_M": (15, False),
    "llama.cpp Q4_K_M, imatrix": (15, True),
}
"""Rows of llama.cpp's: name → its ftype, and whether it gets the importance matrix."""
SPEED_TOKENS = 64


def write_plain(model: Path, output: Path) -> None:
    """The model as it is, in F16."""
    source = Checkpoint(model)
    facts = load_model(model, torch.device("cpu"), torch.float32).config.to_dict() | source.config
    with CheckpointWriter(output, GgufFile(1, describe)) as files:
        files.add(source.tensors(""))
        for path in source.side_files():
            files.copy(path)
        files.finish(source.config, facts)
        files.write_json("config.json", source.config)
        files.commit()


def importance(model: Path, tokens: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """Mean square of every input of every linear of the blocks [K], by llama.cpp's names."""
    parent = load_model(model, torch.device("cpu"), torch.float32)
    family = family_of(parent.config.to_dict())
    sums: dict[str, torch.Tensor] = {}
    seen = 0

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
            flat = inputs[0].detach().flatten(0, -2).double()
            sums[name] = sums.get(name, torch.zeros(())) + flat.square().sum(0)

        return hook

    for name, module in parent.named_modules():
        if isinstance(module, nn.Linear) and (known := family.tensor(f"{name}.weight")):
            module.register_forward_hook(record(known))
    with torch.no_grad():
        for part in torch.split(tokens, 8):
            parent(part, logits_to_keep=1)
            seen += part.numel()
    return {name: (total / seen).float().numpy() for name, total in sums.items()}


def write_theirs(
    plain: Path, output: Path, ftype: int, matrix: Mapping[str, np.ndarray[Any, Any]] | None
) -> None:
    """Quantize with llama.cpp."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = torch.get_num_threads(), ftype
    params.output_tensor_type = params.token_embedding_type = Q8_0
    if matrix is not None:
        cells = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()
        for cell, (name, values) in zip(cells, matrix.items(), strict=False):
            cell.name, cell.size = name.encode(), values.size
            cell.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = cells
    output.parent.mkdir(parents=True, exist_ok=True)
    code = llama_cpp.llama_model_quantize(
        str(plain).encode(), str(output).encode(), ctypes.byref(params)
    )
    if code:
        sys.exit(f"llama.cpp did not quantize {plain} (code {code})")


def recipe_of(name: str, fields: list[str], args: Any) -> Recipe:
    """A shipped recipe as it is measured: for llama.cpp, with embedding and head in 8 bits."""
    recipe = load_recipe(name).with_overrides(
        dataset=args.calibration, nsamples=args.nsamples, seqlen=args.seqlen
    )
    recipe = with_stage_fields(recipe, fields)
    return recipe.model_copy(update={"format": "gguf", "head_bits": 8, "embedding_bits": 8})


def made(model: Path, args: Any) -> Iterator[tuple[str, Path]]:
    """Rows and their files, made where the work folder does not have them yet; F16 comes first."""
    work = args.work / model.name
    if not (work / "f16").exists():
        write_plain(model, work / "f16")
    yield "F16", work / "f16" / FILE
    matrix = None
    for row, (ftype, with_matrix) in THEIRS.items():
        if args.rows and row not in args.rows:
            continue
        path = work / f"llama-{ftype}{'-imatrix' * with_matrix}.gguf"
        if not path.exists():
            if with_matrix and matrix is None:
                tokens = calibration_tokens(
                    load_tokenizer(model),
                    dataset=args.calibration,
                    nsamples=args.matrix_samples or args.nsamples,
                    seqlen=args.seqlen,
                    seed=0,
                )
                matrix = importance(model, tokens.tokens)
            write_theirs(work / "f16" / FILE, path, ftype, matrix if with_matrix else None)
        yield row, path
    for row, (name, fields) in OURS.items():
        if args.rows and row not in args.rows:
            continue
        folder = work / "-".join((name, *fields))
        if not folder.exists():
            recipe = recipe_of(name, fields, args)
            convert(Request(model, recipe, folder, torch.device("cpu"), torch.float32))
        yield row, folder / FILE


def bits_of(path: Path) -> tuple[float, int]:
    """Bits per weight of the matrices of the blocks, and bytes of the file."""
    import gguf

    held = [t for t in gguf.GGUFReader(path).tensors if t.name.startswith("blk.")]
    held = [tensor for tensor in held if len(tensor.shape) > 1]
    weights = sum(math.prod(int(n) for n in tensor.shape) for tensor in held)
    return sum(8 * int(tensor.n_bytes) for tensor in held) / weights, path.stat().st_size


def open_model(path: Path, context: int) -> Any:
    """A model that keeps the logits of all tokens."""
    import llama_cpp

    return llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_batch=context,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        logits_all=True,
        verbose=False,
    )


def log_probs(engine: Any, window: list[int]) -> torch.Tensor:
    """Log probabilities [T − 1, V] of the tokens behind the first."""
    engine.reset()
    engine.eval(window)
    scores = torch.from_numpy(np.array(engine.scores[: len(window) - 1]))
    return scores.log_softmax(dim=-1)


@dataclasses.dataclass
class Figures:
    """What one file makes of the windows, beside the F16 file."""

    perplexity: float
    kld_mean: float
    kld_p99: float
    top1_agreement: float


def measure(path: Path, windows: torch.Tensor, parent: np.memmap[Any, Any], first: bool) -> Figures:
    """Run all windows; the first file is the parent, whose log probabilities are kept."""
    engine = open_model(path, windows.shape[1])
    loss, klds, same = 0.0, [], []
    for index, window in enumerate(windows.tolist()):
        mine = log_probs(engine, window)
        if first:
            parent[index] = mine.numpy()
        theirs = torch.from_numpy(np.array(parent[index]))
        loss -= float(mine.gather(1, torch.tensor(window[1:])[:, None]).double().sum())
        klds.append((theirs.exp() * (theirs - mine)).sum(1).double())
        same.append(mine.argmax(1) == theirs.argmax(1))
    kld, count = torch.cat(klds), windows.numel() - len(windows)
    return Figures(
        perplexity=math.exp(loss / count),
        kld_mean=float(kld.mean()),
        kld_p99=float(kld.quantile(0.99)),
        top1_agreement=float(torch.cat(same).double().mean()),
    )


def speed(path: Path, window: list[int]) -> dict[str, float]:
    """Tokens per second of a prompt and of decoding, the best of three."""
    engine = open_model(path, len(window) + SPEED_TOKENS)
    prompts, steps = [], []
    for _ in range(3):
        engine.reset()
        started = time.perf_counter()
        engine.eval(window)
        prompts.append(len(window) / (time.perf_counter() - started))
        started = time.perf_counter()
        for token in window[:SPEED_TOKENS]:
            engine.eval([token])
        steps.append(SPEED_TOKENS / (time.perf_counter() - started))
    return {"prompt_tokens_per_second": max(prompts), "decode_tokens_per_second": max(steps)}


def difference(folder: Path, windows: torch.Tensor) -> dict[str, float]:
    """llama.cpp's logits beside those of pq's own reader, in float32, on the same file."""
    model = load_model(folder, torch.device("cpu"), torch.float32)
    engine = open_model(folder / FILE, windows.shape[1])
    klds, moved = [], []
    for window in windows:
        with torch.no_grad():
            mine = model(window[None]).logits[0, :-1].log_softmax(-1)
        theirs = log_probs(engine, window.tolist())
        klds.append((mine.exp() * (mine - theirs)).sum(1))
        ours, given = (p.gather(1, window[1:, None]) for p in (mine, theirs))
        moved.append((ours - given).abs())
    return {"kld_mean": float(torch.cat(klds).mean()), "mean_abs": float(torch.cat(moved).mean())}


def table(results: Mapping[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | file | bits | MB | perplexity | KLD | KLD p99 | same top-1 | prompt tokens/s | decode tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results["rows"]:
        speeds = [r.get(f"{what}_tokens_per_second") for what in ("prompt", "decode")]
        shown = " | ".join("" if found is None else f"{found:.0f}" for found in speeds)
        lines.append(
            f"| {r['model']} | {r['file']} | {r['bits_per_weight']:.3f} | {r['bytes'] / 1e6:.1f} "
            f"| {r['perplexity']:.3f} | {r['kld_mean']:.5f} | {r['kld_p99']:.4f} "
            f"| {r['top1_agreement']:.3f} | {shown} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every row of every model, and keep the results after each."""
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("--work", type=Path, help="folder that keeps all files between runs")
    parser.add_argument(
        "--rows", action="append", help="a row to measure, beside F16; all by default"
    )
    parser.add_argument(
        "--matrix-samples", type=int, help="sequences for the importance matrix; all by default"
    )
    args = parser.parse_args()
    args.work = args.work or Path(tempfile.mkdtemp(prefix="pq-gguf-"))
    results = measuring.head(args)
    results["protocol"] = (
        results["protocol"]
        .replace("parent and model in float32; ", "all of them by llama.cpp, the parent in F16; ")
        .replace("lm_head and embeddings stay 16-bit", "lm_head and embeddings are Q8_0")
    )
    import llama_cpp

    results["versions"]["llama-cpp-python"] = llama_cpp.__version__
    for model in args.model:
        tokenizer = load_tokenizer(model)
        text = evaluation_tokens(
            tokenizer,
            dataset=args.text,
            seqlen=args.seqlen,
            max_windows=args.windows,
            bos=bos_of(tokenizer, "auto"),
        )
        windows = text.tokens
        parent = None
        with tempfile.TemporaryDirectory(dir=args.work) as scratch:
            for row, path in made(model, args):
                if parent is None:
                    vocab = open_model(path, 8).n_vocab()
                    shape = (len(windows), windows.shape[1] - 1, vocab)
                    parent = np.memmap(Path(scratch) / "parent", np.float32, "w+", shape=shape)
                bits, size = bits_of(path)
                facts: dict[str, Any] = {"model": model.name, "file": row, "bits_per_weight": bits}
                facts["bytes"] = size
                facts |= dataclasses.asdict(measure(path, windows, parent, row == "F16"))
                if row == "F16" or row.startswith("pq gguf"):
                    facts |= speed(path, windows[0].tolist())
                if row.startswith("pq gguf"):
                    facts["beside_pq"] = difference(path.parent, windows[:2])
                results["rows"].append(facts)
                print(json.dumps(facts), flush=True)
                measuring.keep(results, args.output)


if __name__ == "__main__":
    main()
