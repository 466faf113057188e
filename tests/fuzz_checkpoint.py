"""Mutated checkpoints: reading one gives tensors or an expected error, soon, and touches nothing outside its folder.

    python tests/fuzz_checkpoint.py 100000 [SEED] [source | output]

`source` is what a conversion reads, `output` what `pq verify` and `pq inspect` read of what was converted: its
safetensors, index, config.json with quantization_config, pq.json and pq-statistics.json. A failing input stays in the
folder that is printed.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from conftest import CPU, SENTENCES, config_of, random_weights, save_model, save_side_files
from safetensors.torch import save

from quantize.conversion.loop import Request, convert
from quantize.errors import ModelError, PqError
from quantize.files.checkpoint import INDEX_NAME, Checkpoint
from quantize.files.finite import require_finite_floats
from quantize.files.headers import tensor_headers
from quantize.files.provenance import read_provenance, require_unchanged
from quantize.inspect.inspection import inspect
from quantize.model.load import (
    attention_numerics,
    packed_schemes,
    require_layers,
    require_readable,
    rotated_inputs,
    routing,
    shape_of,
)
from quantize.model.skeleton import Skeleton
from quantize.model.stored import open_stored
from quantize.recipe.recipe import parse_recipe
from quantize.verification.checks import run_check
from quantize.verification.layout import read_layout

SECONDS = 10
"""More than any small input may take."""
SHARDS = {
    "model-00001-of-00002.safetensors": {"model.embed_tokens.weight": torch.arange(6.0).view(2, 3)},
    "model-00002-of-00002.safetensors": {
        "lm_head.weight": torch.ones(2, 3, dtype=torch.bfloat16),
        "b": torch.ones(0),
    },
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 2,
}
CONFIG |= {
    "intermediate_size": 8,
    "num_key_value_heads": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
INDEX = {
    "metadata": {"total_size": 36},
    "weight_map": {name: shard for shard, t in SHARDS.items() for name in t},
}
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1e400,
    "",
    "x" * 5000,
    "../x",
    "/etc/passwd",
    "\0",
    "é\u202e",
    [],
    {},
]
ODD += [
    [[[]]],
    {"a": {"a": {}}},
    "model-00001-of-00002.safetensors",
    "con",
    "a/b",
    "\ud800",
    1 << 40,
    float("nan"),
]


def clean() -> dict[str, bytes]:
    """Files of a sound checkpoint."""
    files = {name: save(tensors, {"format": "pt"}) for name, tensors in SHARDS.items()}
    return files | {
        "config.json": json.dumps(CONFIG).encode(),
        INDEX_NAME: json.dumps(INDEX).encode(),
    }


def mutated(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """One to three changes: of bytes, of lengths, of JSON values and keys, of safetensors headers."""
    out = dict(files)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(out))
        change = rng.choice((_bytes, _cut, _grown, _gone, _data))
        found = change(out[name], name, rng)
        if found is None:
            del out[name]
        else:
            out[name] = found
        if not out:
            break
    return out


def _bytes(raw: bytes, name: str, rng: random.Random) -> bytes:
    work = bytearray(raw)
    for _ in range(rng.randint(1, 8)):
        if work:
            work[rng.randrange(len(work))] = rng.choice(
                (rng.randrange(256), 0, 0xFF, ord('"'), ord("{"), ord("9"))
            )
    return bytes(work)


def _cut(raw: bytes, name: str, rng: random.Random) -> bytes:
    return raw[: rng.randint(0, len(raw))]


def _grown(raw: bytes, name: str, rng: random.Random) -> bytes:
    place = rng.randint(0, len(raw))
    return raw[:place] + rng.randbytes(rng.randint(1, 64)) + raw[place:]


def _gone(raw: bytes, name: str, rng: random.Random) -> None:
    return None


def _data(raw: bytes, name: str, rng: random.Random) -> bytes:
    """A value or key of the JSON, or of a safetensors header, becomes an odd one."""
    is_json = name.endswith(".json")
    try:
        length = 0 if is_json else struct.unpack("<Q", raw[:8])[0]
        data = json.loads(raw if is_json else raw[8 : 8 + length])
    except (ValueError, struct.error, OverflowError):
        return _bytes(raw, name, rng)
    _put_odd(data, rng)
    text = json.dumps(data).encode("utf-8", "surrogatepass")
    if is_json:
        return text
    said = rng.choice((len(text), len(text), len(text), len(text) + 1, 0, 1 << 62, (1 << 64) - 1))
    return struct.pack("<Q", said) + text + raw[8 + length :]


def _put_odd(data: Any, rng: random.Random) -> None:
    """Go down into dicts and lists at random and replace what is there."""
    while isinstance(data, dict | list) and data:
        key = rng.choice(sorted(data)) if isinstance(data, dict) else rng.randrange(len(data))
        if rng.random() < 0.4 or not isinstance(data[key], dict | list) or not data[key]:
            value, odd = data[key], rng.choice(ODD)
            if isinstance(data, dict) and rng.random() < 0.3:
                del data[key]
                data[odd if isinstance(odd, str) else "odd"] = value
            else:
                data[key] = odd
            return
        data = data[key]


@contextmanager
def _in_time() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(folder: Path) -> None:
    """What a conversion reads of its source before it believes any of it."""
    with suppress(ModelError):
        source = Checkpoint(folder)
        require_finite_floats(source.tensors(""), "")
        require_layers(source, shape_of(source))
        stored, model = open_stored(source, torch.float32)
        Skeleton(folder, torch.device("cpu"), torch.float32, model=model).check(
            stored.shapes, tied=False
        )


RECIPE = """{description: d, format: pq, calibration: {dataset: TEXT, nsamples: 4, seqlen: 16}, stages: [
  {method: rotate, down: true}, {method: fireq-attention}, {method: rtn, group_size: 32, ignore: ['*.q_proj']},
  {method: sbvr, bits: 2, sweeps: 1, lines: 8, overhead: 1.0, layers: ['*.q_proj']}]}"""
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}


def converted() -> dict[str, bytes]:
    """Files of a small conversion with every part that a quantization_config can have, but routing."""
    with tempfile.TemporaryDirectory() as name:
        folder, text = Path(name), Path(name) / "text.txt"
        text.write_text("\n".join(SENTENCES * 20), encoding="utf-8")
        config = config_of("llama", **SMALL)
        model = save_model(folder / "model", config, random_weights(config))
        save_side_files(model)
        recipe = parse_recipe(RECIPE.replace("TEXT", str(text)), "r.yaml")
        convert(Request(model, recipe, folder / "out", CPU, torch.float32))
        return {
            path.name: path.read_bytes()
            for path in (folder / "out").iterdir()
            if path.suffix != ".jinja"
        }


def read_output(folder: Path) -> None:
    """What `pq verify` and `pq inspect` read before any block runs; whole layouts, which are slow, for 1 in 20."""
    with suppress(PqError):
        inspect(folder)
    with suppress(PqError):
        found = read_provenance(folder)
        if found is not None:
            parse_recipe(found["recipe"]["resolved"], "r.yaml")
            require_unchanged(folder, found)
    with suppress(PqError):
        source = Checkpoint(folder)
        require_readable(source)
        packed_schemes(source, source.names())
        attention_numerics(source)
        rotated_inputs(source)
        routing(source)
        tensor_headers(source)
    if sum(path.stat().st_size for path in folder.iterdir()) % 20 == 0:
        run_check("layout", lambda: str(read_layout(folder, True, CPU)))


TARGETS: dict[str, tuple[Callable[[], dict[str, bytes]], Callable[[Path], None]]] = {
    "source": (clean, read),
    "output": (converted, read_output),
}


def fuzz(inputs: int, seed: int, root: Path, target: str = "source") -> None:
    """Read so many mutated checkpoints below root; raises what they make the reader raise."""
    make, reader = TARGETS[target]
    rng, sound, folder = random.Random(seed), make(), root / "model"
    for _ in range(inputs):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files = mutated(sound, rng)
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
        with _in_time():
            reader(folder)
        there = {path.name for path in folder.iterdir()}
        assert there == set(files), f"{there ^ set(files)} appeared or went"
        assert [path.name for path in root.iterdir()] == ["model"]


if __name__ == "__main__":
    where = Path(tempfile.mkdtemp(prefix="pq-fuzz-"))
    sys.stdout.write(f"inputs in {where}\n")
    seed, target = [*sys.argv[2:], *("0", "source")[len(sys.argv) - 2 :]]
    fuzz(int(sys.argv[1]), int(seed), where, target)
    shutil.rmtree(where)
    sys.stdout.write("nothing found\n")
