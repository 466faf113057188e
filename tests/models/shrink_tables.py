"""What the fields of configurations are called and how small each may be, and the exceptions by type."""

from __future__ import annotations

from typing import Any

HIDDEN = 128
HEADS = 4
VOCABULARY = 512
MOST_LAYERS = 4
FIRST_TOKEN, LAST_TOKEN = 3, 250
"""Tokens that are special in no model of the zoo."""

LAYER_COUNTS = (
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
)

# Name of a field → the most it may be. A smaller default stays: it is small enough, or says that a part is absent.
CEILINGS: dict[str, int] = {
    name: ceiling
    for ceiling, names in {
        HIDDEN: (
            "hidden_size text_hidden_size projector_hidden_size moe_hidden_size image_token_embed_dim "
            "alignment_intermediate_size d_model n_embd dim emb_dim embed_dim embedding_dim word_embed_proj_dim "
            "embedding_size input_embedding_size output_embedding_size out_hidden_size "
            "projection_dim projector_input_dim projector_output_dim vision_output_dim lru_width "
            "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
            "moe_shared_expert_intermediate_size moe_latent_size adapter_out_dim "
            "backbone_hidden_size hidden_size_global adapter_in_dim adapter_input_size ple_embed_dim "
            "shared_experts_intermediate_size"
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
            "num_embeddings unpadded_vocab_size encoder_hash_byte_group_vocab audio_vocab_size codebook_size "
            "pronunciation_vocab_size shape_vocab_size num_centroids"
        ),
        64: "embedding_size_per_layer pronunciation_embed_dim shape_embed_dim router_hidden_size",
        32: (
            "hidden_size_per_layer_input kv_lora_rank q_lora_rank o_lora_rank hc_lowrank "
            "laurel_rank adapter_rank gated_norm_rank loop_gate_rank linear_key_head_dim "
            "linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim "
            "qk_nope_head_dim v_head_dim index_head_dim dim_head d_head d_kv attention_head_size "
            "swa_head_dim kv_channels prompt_mid_dim prompt_length position_bias_num_buckets "
            "dim_model_base centroid_intermediate_top_k base_channels"
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
    "n_routed_experts": 4,
}
"""What some classes leave None, where their models compute with it."""
MULTIPLIERS = {
    # Published checkpoints have others than the defaults of one, which would hide that one is lost.
    "embedding_multiplier": 3.0,
    "attention_multiplier": 1 / 16,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 1.2,
    "key_multiplier": 0.6,
    "lm_head_multiplier": 0.5,
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.7,
    "full_attn_alpha_factor": 1.5,
    "full_attn_beta_factor": 0.75,
    "linear_attn_alpha_factor": 1.25,
    "linear_attn_beta_factor": 0.5,
    "mlp_alpha_factor": 1.5,
    "mlp_beta_factor": 0.5,
}
HEAD_DIMS = ("head_dim", "global_head_dim", "attention_head_dim")


NEEDED: dict[str, dict[str, Any]] = {
    # Its class refuses the default of its own sub-configuration.
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
}
"""Type → what its class must be told to make any configuration at all."""


def _rope_in_sections(*sections: int) -> dict[str, Any]:
    """Rotary parameters with so many pairs for time, height and width."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}


_GEMMA4 = {
    # The width of heads of full attention is no field of theirs; it is twice that of the others.
    "global_head_dim": 64,
    # As E2B: the last layers take keys and values from one before them, and have wider FFNs.
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Its heads are those of the SSM, twice the hidden size wide.
    "mamba2": {"head_dim": 64},
    # Its SSM heads of 8 would be 32 of them.
    "falcon_h1": {"mamba_d_head": 32},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": {"global_head_dim": 64},
    # A layer of cross-attention, as its checkpoints have.
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    # The last layers take keys and values from one before them of their kind: of each kind, one and one.
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [256] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    # A pattern of layers, of which its class makes the list.
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    # Its class leaves the kinds of layers open.
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "conv", "full_attention"],
        "num_dense_layers": 1,
    },
    # A block that layers share shows only where two of them do.
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    # Kinds by periods and offsets: layers with and without attention, with and without experts.
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    # Its class makes rotary parameters without the kinds of layers by which its model asks for them.
    "cohere_compass_text": {"rope_parameters": {"full_attention": _rope_in_sections(6, 5, 5)}},
    # Sparse attention's sizes are open.
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 64,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    # Sizes of sliding layers are no fields of theirs.
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 48,
        "swa_qk_nope_head_dim": 32,
        "swa_v_head_dim": 32,
    },
    # Their models divide heads of the default width among axes unless told otherwise.
    "qwen2_vl_text": {"rope_parameters": _rope_in_sections(4, 6, 6)},
    "qwen2_5_vl_text": {"rope_parameters": _rope_in_sections(4, 6, 6)},
    "qwen2_5_omni_text": {"rope_parameters": _rope_in_sections(4, 6, 6)},
    "qwen3_vl_text": {"rope_parameters": _rope_in_sections(6, 5, 5)},
    "qwen3_vl_moe_text": {"rope_parameters": _rope_in_sections(6, 5, 5)},
    "qwen3_omni_moe_text": {"rope_parameters": _rope_in_sections(6, 5, 5)},
    "ernie4_5_vl_moe_text": {"rope_parameters": _rope_in_sections(5, 5, 6)},
    "paddleocr_vl_text": {"rope_parameters": _rope_in_sections(8, 12, 12)},
    "hunyuan_vl_text": {"rope_parameters": _rope_in_sections(4, 4, 4, 4)},
    "glm4v_text": {"rope_parameters": _rope_in_sections(4, 6, 6)},
    "glm_ocr_text": {"rope_parameters": _rope_in_sections(4, 6, 6)},
    "glm4v_moe_text": {
        "rope_parameters": _rope_in_sections(2, 3, 3) | {"partial_rotary_factor": 0.5}
    },
    # The default shows one kind of layer where published checkpoints have two or more.
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"]},
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": [1]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    # A pattern of three kinds, repeated over the layers.
    "recurrent_gemma": {"num_hidden_layers": 3},
    # Pairs of attention and FFN are one layer; the layers between the first and the last run twice.
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    # Windows of 128 tokens would never be compressed in short texts.
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    },
    # Which layers of the image tower feed which of the decoder, or are pooled.
    "granite4_vision": {"deepstack_layer_map": [[1, 0]], "downsample_rate": "1/2"},
    # Its tokenizer of sound has no projection between these sizes.
    "apertus1p5": {"audio_config": {"codebook_dim": 128}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    # A default of the whole that its image tower's own configuration does not have.
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    # Images come as tokens, of which the default has none.
    "chameleon": {"vocabulary_map": {"<image>": 511}},
    "emu3": {"vocabulary_map": {"<image>": 511}},
    # Layers attend to the results of groups of layers, of which there are two; the loop goes over the second.
    "inkling2_text": {"num_hidden_layers": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "inkling2_loop_text": {
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "loop_layer_index_start": 2,
        "loop_layer_index_end": 4,
        "loop_num_passes": 2,
    },
    # Its attention reads what the class of its own sub-configuration does not set.
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    # Its sliding layers have no window by default.
    "step3p5": {"sliding_window": 16},
    # How many experts see every token is open.
    "dots1": {"n_shared_experts": 1},
    # A causal model only when told, its hashes random; positions are factors of the context, and the widths of their
    # embeddings add up to the hidden size.
    "reformer": {
        "is_decoder": True,
        "hash_seed": 1,
        "axial_pos_shape": [8, 32],
        "axial_pos_embds_dim": [64, 64],
    },
    # An adapter for each language, and which of them.
    "xmod": {"default_language": "en_XX"},
}
"""Type → fields for which names say too little, each with its reason."""
