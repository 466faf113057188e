"""A served model read from a checkpoint's headers: what `pq inspect` finds, sharded as vLLM does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantize.errors import ModelError
from quantize.files.checkpoint import Checkpoint
from quantize.formats.registry import format_in
from quantize.inspect.inspection import DecoderBlock, Inspection, Linear, Other, inspect
from quantize.model.transformers_api import decoder_facts, text_facts
from quantize.plan.kv import KvType, head_dim, kv_type, layer_of
from quantize.plan.served import ServedModel, WeightPart
from quantize.plan.sharding import (
    EXPERT,
    OTHERS,
    Routing,
    block_parts,
    linear_parts,
    merged,
    routing_of,
    vocabulary,
)

_COMPUTE = {"fp8": "fp8", "int8": "int8", "fp4": "fp4"}
"""What inputs are rounded to → what matrices are multiplied in, on GPUs that can."""
_OWN_FP8 = ("fp8", "fbgemm_fp8", "modelopt")
"""Methods that round inputs to FP8 as well, though config.json has no word of it by linear."""


def served_model(folder: Path, kv: str = "auto", name: str | None = None) -> ServedModel:
    """The model of a folder, plain or quantized, as an engine would hold it.

    kv: type of the KV cache, of `plan.kv.KV_TYPES`, or auto. name: None takes the folder's.
    ModelError for one that cannot be read, or whose decoder's sizes config.json does not tell.
    """
    return model_of(inspect(folder), Checkpoint(folder).config, kv, name)


def model_of(
    found: Inspection, config: Mapping[str, Any], kv: str = "auto", name: str | None = None
) -> ServedModel:
    """The same of what `inspect` found, or would find. config: config.json of it; further arguments
    and errors as of `served_model`."""
    folder = Path(found.folder)
    facts = text_facts(folder, config) | {
        key: value for key, value in decoder_facts(folder, config).items() if value is not None
    }
    if config.get("tie_word_embeddings") is False:
        facts["tie_word_embeddings"] = False  # a head that a conversion gave the model
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        if not isinstance(facts.get(key), int):
            raise ModelError(
                f"{folder}/config.json: {key} is missing, without which no memory can be told; "
                "give a decoder of text"
            )
    model = build(found, facts, kv_type(kv, config), name or str(found.origin or folder.name))
    form = format_in(config.get("quantization_config"))
    if form is not None and not form.served:
        note = f"format {form.name}: vLLM reads it with pq's plugin alone"
        return replace(model, notes=(*model.notes, note))
    return model


def build(found: Inspection, facts: Mapping[str, Any], kept: KvType, name: str) -> ServedModel:
    """The model of what `inspect` found. facts: of its text decoder; kept: its KV cache."""
    layers = int(facts["num_hidden_layers"])
    heads = int(facts["num_attention_heads"])
    kv_heads = int(facts.get("num_key_value_heads") or heads)
    decoder, rest = _decoder(found.blocks, layers)
    routing = routing_of(facts)
    notes: list[str] = []
    parts = [p for block in decoder for p in block_parts(block, heads, kv_heads, routing)]
    unknown = Counter(x.role for b in decoder for x in b.linears if _whole(x, heads, kv_heads))
    if unknown:
        shown = ", ".join(sorted(unknown)[:4])
        notes.append(f"{shown}: counted whole on every GPU, since it is not known how they are cut")
    tower = sum(block.bytes for block in rest)
    around, outside = _outside(found.outside, facts, tower)
    parts += around
    if outside:
        notes.append(
            f"{outside / 1e9:.2f} GB beside the decoder: whole on every GPU, not read to decode"
        )
    kv = [layer_of(block, i, facts, kept) for i, block in enumerate(decoder)]
    if missing := sum(layer is None for layer in kv):
        notes.append(
            f"{missing} of {layers} layers keep no keys and values of their own, or a state that is not known"
        )
    if any(b.index >= layers for b in rest if _list_of(b) == _list_of(decoder[0])):
        notes.append("layers behind the last that config.json counts are not served")
    if kept.vllm is None:
        notes.append(
            "its INT4 KV cache needs pq's own kernels: transformers, or pq's plugin for vLLM"
        )
    latent = facts.get("kv_lora_rank")
    rope = int(facts.get("qk_rope_head_dim") or 0)
    nope = int(facts.get("qk_nope_head_dim") or 0)
    values = int(facts.get("v_head_dim") or 0)
    context = facts.get("max_position_embeddings")
    return ServedModel(
        name=name,
        parts=merged(parts),
        layers=layers,
        hidden=int(facts["hidden_size"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim(facts),
        parameters_per_token=round(sum(_work(b, routing) for b in decoder)),
        head_parameters=int(facts["hidden_size"]) * _vocab(facts),
        compute=_compute(decoder),
        kv=tuple(layer for layer in kv if layer is not None),
        score_dim=nope + rope + values if isinstance(latent, int) else 0,
        latent_dim=2 * latent + rope if isinstance(latent, int) else 0,
        ffn_width=max((_width(b, routing) for b in decoder), default=0),
        max_context=context if isinstance(context, int) else None,
        notes=tuple(notes),
    )


def _list_of(block: DecoderBlock) -> str:
    return block.name.rpartition(".")[0]


def _decoder(
    blocks: Sequence[DecoderBlock], layers: int
) -> tuple[list[DecoderBlock], list[DecoderBlock]]:
    """Blocks of the text decoder, and the others: of the lists that are long enough the largest."""
    sizes: dict[str, int] = {}
    counts = Counter(_list_of(block) for block in blocks)
    for block in blocks:
        if counts[_list_of(block)] >= layers:
            sizes[_list_of(block)] = sizes.get(_list_of(block), 0) + block.bytes
    if not sizes:
        raise ModelError(
            f"no list of {layers} decoder blocks among the tensors, which config.json counts; "
            "give a complete checkpoint"
        )
    best = max(sizes, key=lambda name: sizes[name])
    mine = [_list_of(b) == best and b.index < layers for b in blocks]
    return (
        [b for b, inside in zip(blocks, mine, strict=True) if inside],
        [b for b, inside in zip(blocks, mine, strict=True) if not inside],
    )


def _whole(linear: Linear, heads: int, kv_heads: int) -> bool:
    """Whether a linear is counted whole on every GPU for want of knowledge."""
    return any(p.name == OTHERS for p in linear_parts(linear, heads, kv_heads, None))


def _vocab(facts: Mapping[str, Any]) -> int:
    return max(1, int(facts.get("vocab_size") or 1))


def _outside(
    outside: Sequence[Other], facts: Mapping[str, Any], tower: int
) -> tuple[list[WeightPart], int]:
    """Parts of the tensors around the blocks, and bytes of towers and the like."""
    head = [x for x in outside if _is_head(x.name)]
    tables = [x for x in outside if _is_table(x.name, x.shape, facts)]
    tied = bool(facts.get("tie_word_embeddings")) or not head
    parts, beside = [], tower
    for table in tables:
        size = min(table.bytes, 2 * math.prod(table.shape))
        parts.append(vocabulary("embedding", size, table.shape[0], looked_up=not tied))
    if not tied:
        size = sum(
            x.bytes
            if len(x.shape) != 2 or "F" not in x.dtype
            else min(x.bytes, 2 * math.prod(x.shape))
            for x in head
        )
        parts.append(vocabulary("head", size, _vocab(facts), looked_up=False))
    for other in outside:
        if other in head or other in tables:
            continue
        if len(other.shape) > 1:
            beside += other.bytes
        else:
            parts.append(WeightPart("what every GPU holds", other.bytes))
    if beside:
        parts.append(WeightPart("beside the decoder", beside, looked_up=True))
    return parts, beside


def _is_head(name: str) -> bool:
    return ".lm_head." in f".{name}" or name.startswith("output.")


def _is_table(name: str, shape: tuple[int, ...], facts: Mapping[str, Any]) -> bool:
    """Whether a tensor is the embedding of tokens."""
    return len(shape) == 2 and shape[0] == _vocab(facts) and not _is_head(name)


def _work(block: DecoderBlock, routing: Routing | None) -> float:
    """Weights of a block that one token is multiplied by."""
    total = 0.0
    share = routing.active / routing.experts if routing else 1.0
    if block.routing:
        count = len(
            {
                x.name.split(".experts.")[-1].split(".")[0]
                for x in block.linears
                if ".experts." in x.name
            }
        )
        k = block.routing.get("k")
        share = k / max(1, count) if isinstance(k, int) else 0.5
    for linear in block.linears:
        weights = linear.weights
        if weights is None:
            weights = 8 * linear.bytes // (linear.bits or 16)
        total += weights * (share if EXPERT.search(linear.name) else 1.0)
    for other in block.others:
        if EXPERT.search(other.name) and len(other.shape) > 2:
            total += math.prod(other.shape) * share
    return total


def _width(block: DecoderBlock, routing: Routing | None) -> int:
    """Channels between gate, up and down that one token makes in a block."""
    width = 0.0
    for linear in block.linears:
        if linear.role != "down" or linear.shape is None:
            continue
        if not EXPERT.search(linear.name):
            width += linear.shape[1]
        elif routing:
            width += linear.shape[1] * routing.active / routing.experts
    return round(width)


def _multiplied_in(linear: Linear) -> str:
    """What engines multiply one linear in, on GPUs that can."""
    if not linear.quantized:
        return "bf16"
    if linear.activations == "none" and linear.format.partition(" ")[0] in _OWN_FP8:
        return "fp8" if linear.bits == 8 else "bf16"
    return _COMPUTE.get(linear.activations, "bf16")


def _compute(blocks: Sequence[DecoderBlock]) -> str:
    """What most weights are multiplied in."""
    counts: Counter[str] = Counter()
    for block in blocks:
        for linear in block.linears:
            counts[_multiplied_in(linear)] += linear.weights or linear.bytes
        for other in block.others:
            if len(other.shape) > 2 and EXPERT.search(other.name):
                counts["bf16"] += math.prod(other.shape)
    return counts.most_common(1)[0][0] if counts else "bf16"
