"""The configuration of any model type, shrunken by what its fields are called.

A type's own default configuration is kept in everything that says how the model computes: kinds of
layers, ratios of heads, biases, norms, caps. Only sizes shrink. The class makes the small
configuration itself from the changed fields, so that what it derives from them stays right.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN = 128
HEADS = 4
VOCABULARY = 512
MOST_LAYERS = 4
FIRST_TOKEN, LAST_TOKEN = 3, 287
"""Tokens that are special in no model of the zoo."""

LAYER_COUNTS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "depth",
    "num_blocks",
    "num_encoder_layers",
    "num_decoder_layers",
]

# Name of a field → the most it may be. A smaller default stays: it is small enough, or says that a part is absent.
CEILINGS: dict[str, int] = {
    name: ceiling
    for ceiling, names in {
        HIDDEN: (
            "hidden_size d_model n_embd dim emb_dim embed_dim embedding_dim word_embed_proj_dim "
            "embedding_size input_embedding_size output_embedding_size out_hidden_size "
            "projection_dim projector_input_dim projector_output_dim vision_output_dim lru_width "
            "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
            "moe_shared_expert_intermediate_size moe_latent_size adapter_out_dim "
            "backbone_hidden_size ple_embed_dim shared_experts_intermediate_size"
        ),
        2 * HIDDEN: (
            "intermediate_size intermediate_size_mlp dense_intermediate_size ffn_dim n_inner "
            "decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_ff d_inner mlp_dim "
            "shared_intermediate_size feed_forward_size max_position_embeddings n_positions n_ctx "
            "context_length max_seq_len mamba_d_ssm mamba_intermediate_size "
            "shared_mlp_intermediate_size attention_intermediate_size"
        ),
        VOCABULARY: (
            "vocab_size vocab_size_per_layer_input decoder_vocab_size ngram_vocab_size_base "
            "unpadded_vocab_size encoder_hash_byte_group_vocab audio_vocab_size codebook_size "
            "pronunciation_vocab_size shape_vocab_size num_centroids"
        ),
        64: "embedding_size_per_layer pronunciation_embed_dim shape_embed_dim router_hidden_size",
        32: (
            "hidden_size_per_layer_input kv_lora_rank q_lora_rank o_lora_rank hc_lowrank "
            "laurel_rank adapter_rank gated_norm_rank loop_gate_rank linear_key_head_dim "
            "linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim "
            "qk_nope_head_dim v_head_dim index_head_dim dim_head d_head d_kv attention_head_size "
            "swa_head_dim kv_channels prompt_mid_dim prompt_length position_bias_num_buckets "
            "dim_model_base centroid_intermediate_top_k"
        ),
        16: (
            "qk_rope_head_dim sliding_window sliding_window_size attention_chunk_size "
            "attention_window_size local_attention window_size mamba_d_state state_size "
            "ssm_state_size mamba_chunk_size chunk_size block_size keep_window_size index_topk "
            "local_attn_chunk_length lsh_attn_chunk_length time_step_rank mamba_dt_rank "
            "local_attention_window_len rel_extent mem_len index_block_size rotary_dim"
        ),
        HEADS: (
            "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
            "encoder_attention_heads attention_heads num_decoder_attention_heads "
            "num_encoder_attention_heads swa_num_attention_heads linear_num_heads "
            "linear_num_value_heads index_n_heads num_local_experts num_experts moe_num_experts "
            "n_routed_experts zero_expert_num conf_num_attention_heads split_ngram_parts "
            "num_query_groups d_rel num_prefix_tokens n_recurrent_layers"
        ),
        # Heads of 32 that make two hidden sizes, which SSM layers expand to.
        2 * HEADS: "mamba_n_heads mamba_num_heads n_mamba_heads",
        2: (
            "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k topk_group n_group "
            "num_expert_group n_groups mamba_n_groups mamba_ngroups linear_num_key_heads o_groups "
            "num_layers_per_stack n_input_layers n_output_layers num_global_layers num_local_blocks "
            "n_layers_per_attn_res_block heads_per_ngram num_codebooks top_k_experts "
            "index_topk_blocks"
        ),
        1: "first_k_dense_replace num_dense_layers moe_layer_start_index num_nextn_predict_layers",
    }.items()
    for name in names.split()
}
KEY_HEADS = {
    # Heads of keys and values → the heads of queries that share them.
    "num_key_value_heads": ("num_attention_heads", "n_head", "num_heads"),
    "num_kv_heads": ("num_attention_heads",),
    "kv_n_heads": ("n_heads",),
    "swa_num_key_value_heads": ("swa_num_attention_heads",),
    "num_global_key_value_heads": ("num_attention_heads",),
}
WITHOUT_DEFAULT = {
    "head_dim": HIDDEN // HEADS,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
}
"""What some classes leave None, where their models compute with it."""
HEAD_DIMS = ("head_dim", "global_head_dim", "attention_head_dim")


def default_config(model_type: str) -> PretrainedConfig:
    """A type's configuration as its class makes it when told nothing."""
    return AutoConfig.for_model(model_type, **NEEDED.get(model_type, {}))


def shrunken(model_type: str, **changes: Any) -> PretrainedConfig:
    """The small configuration of a type; `changes` are fields that are to differ from it."""
    config = default_config(model_type)
    told = NEEDED.get(model_type, {}) | small_fields(config) | EXCEPTIONS.get(model_type, {})
    return type(config)(**(told | changes))


def small_fields(config: PretrainedConfig) -> dict[str, Any]:
    """What to tell a configuration's class so that it makes a small one: field → value."""
    raw = {field.name: field.default for field in fields(config)}  # type: ignore[arg-type]
    subs = getattr(config, "sub_configs", {})
    total = next((getattr(config, n) for n in LAYER_COUNTS if isinstance(raw.get(n), int)), None)
    kept = kept_layers(config, total) if total else []
    out: dict[str, Any] = {}
    spare = iter(range(VOCABULARY - 1, LAST_TOKEN, -1))
    for name in raw:
        value = getattr(config, name, None)
        if name in subs:
            if isinstance(value, PretrainedConfig):
                inner = small_fields(value) | EXCEPTIONS.get(value.model_type, {})
                out[name] = {"model_type": value.model_type} | inner
        elif name in LAYER_COUNTS and isinstance(value, int) and raw[name] is not None:
            out[name] = min(value, len(kept) or 2)
        elif is_token(name) and value is not None:
            out[name] = token(name, value, spare)
        elif value is None and name in WITHOUT_DEFAULT:
            out[name] = WITHOUT_DEFAULT[name]
        elif name == "rope_parameters":
            continue  # after the heads are known
        elif is_per_layer(value, total):
            if is_index_set(value, total):
                if raw[name] is not None:
                    out[name] = [kept.index(i) for i in value if i in kept]
            else:
                out[name] = [value[i] for i in kept]
        elif isinstance(value, int) and not isinstance(value, bool) and raw[name] is not None:
            small = size(name, value, config)
            if small != value:
                out[name] = small
        elif is_index_set(value, total) and raw[name] is not None:
            out[name] = [kept.index(i) for i in value if i in kept]
    out.update(rope(config, raw, out))
    return out


def size(name: str, value: int, config: PretrainedConfig) -> int:
    """A size by its field's name."""
    if name in KEY_HEADS:
        heads = next((getattr(config, n) for n in KEY_HEADS[name] if hasattr(config, n)), value)
        return HEADS if value >= heads else 1 if value == 1 else HEADS // 2
    if name in HEAD_DIMS:
        heads = getattr(config, "num_attention_heads", None) or 1
        ratio = value * heads / max(1, getattr(config, "hidden_size", 0) or value * heads)
        return 32 if 0.7 < ratio < 1.5 else 16 if ratio < 1 else 64
    if name == "image_size":
        return min(value, 4 * int(getattr(config, "patch_size", 16) or 16))
    return min(value, CEILINGS.get(name, value))


def kept_layers(config: PretrainedConfig, total: int) -> list[int]:
    """Layers of the default configuration that show every kind of layer there is, 2 to 4 of them."""
    lists = []
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name, None)
        if is_index_set(value, total):
            lists.append([i in value for i in range(total)])
        elif is_per_layer(value, total):
            lists.append([repr(entry) for entry in value])
    for name in ("first_k_dense_replace", "num_dense_layers"):
        dense = getattr(config, name, None)
        if isinstance(dense, int):
            lists.append([i < dense for i in range(total)])
    kinds = list(zip(*lists, strict=True)) if lists else [()] * total
    chosen = sorted({kinds.index(kind) for kind in kinds})
    if len(chosen) > MOST_LAYERS:
        # Every value of every list, if not every combination.
        chosen = sorted({values.index(value) for values in lists for value in values})[:MOST_LAYERS]
    for i in range(total):
        if len(chosen) >= 2:
            break
        if i not in chosen:
            chosen.append(i)
    return sorted(chosen)


def is_per_layer(value: object, total: int | None) -> bool:
    return isinstance(value, list | tuple) and len(value) == total


def is_index_set(value: object, total: int | None) -> bool:
    """Whether a list names layers: integers that rise and lie among them."""
    return (
        isinstance(value, list | tuple)
        and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
        and all(a < b for a, b in itertools.pairwise(value))
        and (not value or (total is not None and value[0] >= 0 and value[-1] < total))
        and (len(value) > 2 or not value)
    )


def is_token(name: str) -> bool:
    return bool(re.search(r"(_token_id|_token_index|_token_ids|_tokens?_ids?)$", name))


def token(name: str, value: Any, spare: Any) -> Any:
    """A special token inside the small vocabulary: those of the zoo's tokenizer, others at its end."""
    fixed = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if name in fixed:
        return fixed[name]
    if isinstance(value, int):
        return value if 0 <= value < FIRST_TOKEN else next(spare)
    return [next(spare) for _ in value] if isinstance(value, list | tuple) else value


def rope(
    config: PretrainedConfig, raw: Mapping[str, Any], small: Mapping[str, Any]
) -> dict[str, Any]:
    """Rotary parameters whose sections fill the small heads."""
    value = getattr(config, "rope_parameters", None)
    if "rope_parameters" not in raw or not isinstance(value, dict) or "mrope_section" not in value:
        return {}
    section = value["mrope_section"]
    heads = small.get("num_attention_heads", HEADS)
    width = small.get("head_dim") or small.get("hidden_size", HIDDEN) // heads
    pairs = int(width * value.get("partial_rotary_factor", 1.0)) // 2
    new = [entry * pairs // sum(section) for entry in section]
    new[0] += pairs - sum(new)
    return {"rope_parameters": value | {"mrope_section": new}}


NEEDED: dict[str, dict[str, Any]] = {
    # Its class refuses its own default: 256.
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
    },
}
"""Type → what its class must be told to make any configuration at all."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Its heads are those of the SSM, twice the hidden size wide.
    "mamba2": {"head_dim": 64},
    # Its heads of 8 would be 32.
    "falcon_h1": {"mamba_d_head": 32},
}
"""Type → fields for which names say too little, each with its reason."""


def known_types() -> list[str]:
    return list(CONFIG_MAPPING)
