"""What a checkpoint holds, told from config.json, safetensors headers and pq.json
alone; no tensor is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.files.checkpoint import Checkpoint
from quantize.files.headers import Header, noted_shapes, tensor_headers
from quantize.files.hub_origin import HubOrigin, hub_origin
from quantize.formats.registry import open_checkpoint
from quantize.inspect.origin import Origin, read_origin
from quantize.model.roles import ROLES, ROUTER, natural, role_of
from quantize.model.storage import Storage, storage_of

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)
_TOWER = re.compile("vis|patch|image|audio")
_BLOCK = re.compile(r"(?P<blocks>.*?)\.(?P<index>\d{1,6})\.(?P<local>.+)")


@dataclass(frozen=True)
class Linear:
    """One linear of a decoder block."""

    name: str
    """Relative to its block."""
    role: str
    """q, k, v, o, gate, up, down or router; the name's last part where
    the architecture is unknown."""
    shape: tuple[int, int] | None
    """(N, K): outputs, inputs; None where headers do not tell."""
    format: str
    bits: int | None
    group_size: int | None
    activations: str
    """none, fp8, int8, …: what activations are rounded to."""
    quantized: bool
    weights: int | None
    bytes: int
    """Of all its tensors but the bias."""
    bits_per_weight: float | None
    """As stored: codes, scales, zero points; without the note of the shape."""


@dataclass(frozen=True)
class Other:
    """A tensor that is no linear's: embedding, norm, head, bias, or of a kind that is not known."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class DecoderBlock:
    """One decoder block."""

    name: str
    index: int
    linears: tuple[Linear, ...]
    others: tuple[Other, ...]
    bytes: int
    routing: Mapping[str, Any] | None = None
    """How tokens find its experts, in pq's own format; None where
    config.json's own fields say it."""


@dataclass(frozen=True)
class Totals:
    """Sizes of the whole checkpoint. None where the shape of some linear cannot be told."""

    parameters: int | None
    embedding_parameters: int
    quantized_parameters: int | None
    quantized_bits_per_weight: float | None
    """Of quantized linears, scales counted; None also where there are none."""
    bits_per_weight: float | None
    """Of everything: embedding, head and norms counted."""
    tensor_bytes: int
    expected_bytes: int | None
    """What bits + 16 / group_size for each quantized weight and the other tensors add up to."""
    file_bytes: int
    """Of the safetensors files."""
    sixteen_bit_bytes: int | None
    """What all parameters would take in 16 bits."""


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` finds; field names are the keys of `pq inspect --json`."""

    folder: str
    origin: HubOrigin | None
    """Id and commit of a model in the Hub's cache."""
    model_type: str
    architecture: str
    sizes: Mapping[str, int]
    formats: tuple[str, ...]
    attention: Mapping[str, Any] | None
    """How attention rounds, in pq's own format; None where it does not."""
    totals: Totals
    blocks: tuple[DecoderBlock, ...]
    outside: tuple[Other, ...]
    """Tensors that are in no block."""
    notes: tuple[str, ...]
    """What of the folder is not read, and which blocks are none of the decoder's, a line each."""
    made: Origin | None
    """None where pq.json is absent or cannot be used."""
    made_problem: str | None
    """Why pq.json cannot be used."""


def inspect(folder: Path) -> Inspection:
    """Describe a plain or quantized checkpoint, pq's or another tool's, as far as its headers tell.

    ModelError for a folder that is no readable safetensors checkpoint.
    """
    source = open_checkpoint(folder)
    headers = tensor_headers(source)
    stored = storage_of(
        headers,
        source.config.get("quantization_config"),
        noted_shapes(source, headers),
    )
    blocks, outside = _by_block(headers, stored)
    blocks = _with_routing(blocks, _native(source.config, "routing"))
    file_bytes = sum((folder / shard).stat().st_size for shard in source.shards)
    made, problem = read_origin(folder)
    return Inspection(
        folder=str(folder),
        origin=hub_origin(folder),
        model_type=str(source.config.get("model_type", "unknown")),
        architecture=_architecture(source.config),
        sizes=_sizes(source.config),
        formats=tuple(dict.fromkeys(linear.format for block in blocks for linear in block.linears)),
        attention=_native(source.config, "attention"),
        totals=_totals(headers, stored, outside, file_bytes),
        blocks=blocks,
        outside=outside,
        notes=(*source.notes, *_passed_over(source), *_beyond(blocks, _sizes(source.config))),
        made=made,
        made_problem=problem,
    )


def _passed_over(source: Checkpoint) -> tuple[str, ...]:
    """A line about what is as if it were not there."""
    names = source.passed_over
    return (f"not counted: {names[0]} and the like ({len(names)})",) if names else ()


def _beyond(blocks: tuple[DecoderBlock, ...], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """A line about the blocks behind the last one that config.json counts."""
    count = sizes.get("num_hidden_layers", 0)
    lists = {block.name.rpartition(".")[0] for block in blocks if block.index == count - 1}
    found = [b.name for b in blocks if b.index >= count and b.name.rpartition(".")[0] in lists]
    return (f"behind the last of {count} layers: {', '.join(found)}",) if found else ()


def _native(config: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """An object within quantization_config; None where there is none."""
    quantization = config.get("quantization_config")
    found = quantization.get(key) if isinstance(quantization, dict) else None
    return found if isinstance(found, dict) else None


def _with_routing(
    blocks: tuple[DecoderBlock, ...],
    routing: Mapping[str, Any] | None,
) -> tuple[DecoderBlock, ...]:
    """Blocks with the policies that name their FFNs."""
    policies = {}
    for name, policy in (routing or {}).items():
        if isinstance(policy, dict):
            policies[name.rpartition(".")[0]] = policy
    return tuple(replace(block, routing=policies.get(block.name)) for block in blocks)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "unknown"


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    text = config.get("text_config")  # models that also see or hear
    both = {**text, **config} if isinstance(text, dict) else config
    return {key: both[key] for key in _SIZES if isinstance(both.get(key), int)}


def _by_block(
    headers: Mapping[str, Header], stored: Mapping[str, Storage]
) -> tuple[tuple[DecoderBlock, ...], tuple[Other, ...]]:
    """Tensors by block, in order of the blocks, and those in none."""
    linears: dict[tuple[str, int], list[Linear]] = {}
    others: dict[tuple[str, int], list[Other]] = {}
    outside: list[Other] = []
    matrices = {part for storage in stored.values() for part in storage.parts}
    for name, storage in stored.items():
        if found := _BLOCK.fullmatch(name):
            key, local = (found["blocks"], int(found["index"])), found["local"]
            linears.setdefault(key, []).append(
                _linear(local, role_of(local), storage),
            )
    for name, header in headers.items():
        found = _BLOCK.fullmatch(name)
        if not found or not _in_block(found, linears):
            outside.append(Other(name, header.dtype, header.shape, header.bytes))
        elif name not in matrices:
            other = Other(found["local"], header.dtype, header.shape, header.bytes)
            others.setdefault((found["blocks"], int(found["index"])), []).append(other)
    order = (*ROLES, ROUTER)
    blocks = []
    for key in sorted({*linears, *others}):
        mine = sorted(
            linears.get(key, []),
            key=lambda x: (order.index(x.role) if x.role in order else 99, natural(x.name)),
        )
        rest = sorted(others.get(key, []), key=lambda x: x.name)
        size = sum(x.bytes for x in mine) + sum(x.bytes for x in rest)
        blocks.append(DecoderBlock(f"{key[0]}.{key[1]}", key[1], tuple(mine), tuple(rest), size))
    return tuple(blocks), tuple(sorted(outside, key=lambda x: x.name))


def _in_block(found: re.Match[str], linears: Mapping[tuple[str, int], object]) -> bool:
    """Whether a tensor `X.3.weight` is of a block 3 of X: where that has linears. Otherwise X is a
    row of modules, such as a projector, of which the linear or norm 3 has the tensor."""
    return (found["blocks"], int(found["index"])) in linears or "." in found["local"]


def _linear(local: str, role: str | None, storage: Storage) -> Linear:
    return Linear(
        name=local,
        role=role or local.rpartition(".")[2],
        shape=storage.shape,
        format=storage.format,
        bits=storage.bits,
        group_size=storage.group_size,
        activations=storage.activations,
        quantized=storage.quantized,
        weights=storage.weights,
        bytes=storage.bytes,
        bits_per_weight=8 * storage.code_bytes / storage.weights if storage.weights else None,
    )


def _totals(
    headers: Mapping[str, Header],
    stored: Mapping[str, Storage],
    outside: tuple[Other, ...],
    file_bytes: int,
) -> Totals:
    quantized = [storage for storage in stored.values() if storage.quantized]
    inside = {part for storage in quantized for part in storage.parts}
    plain = [header for name, header in headers.items() if name not in inside]
    plain_bytes = sum(header.bytes for header in plain)
    tensor_bytes = sum(header.bytes for header in headers.values())
    known = [storage.weights for storage in quantized if storage.weights]
    weights = sum(known) if len(known) == len(quantized) else None
    others = sum(math.prod(header.shape) for header in plain)
    parameters = None if weights is None else weights + others
    embeddings = [other for other in outside if _is_embedding(other.name)]
    code_bytes = sum(storage.code_bytes for storage in quantized)
    return Totals(
        parameters=parameters,
        embedding_parameters=sum(math.prod(other.shape) for other in embeddings),
        quantized_parameters=weights,
        quantized_bits_per_weight=8 * code_bytes / weights if weights else None,
        bits_per_weight=8 * tensor_bytes / parameters if parameters else None,
        tensor_bytes=tensor_bytes,
        expected_bytes=_expected_bytes(quantized, plain_bytes),
        file_bytes=file_bytes,
        sixteen_bit_bytes=None if parameters is None else 2 * parameters,
    )


def _is_embedding(name: str) -> bool:
    # GPT-2's tables are called wte; patches of images are no tokens.
    return ("embed" in name and not _TOWER.search(name)) or ".wte." in f".{name}"


def _expected_bytes(quantized: list[Storage], plain_bytes: int) -> int | None:
    bits = 0.0
    for storage in quantized:
        if storage.expected_bits is None:
            return None
        bits += storage.expected_bits
    return plain_bytes + math.ceil(bits / 8)
