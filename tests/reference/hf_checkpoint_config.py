"""The `config.json` of a fabricated directory, in the fields of the released files or of transformers 5."""

from typing import Any, Literal

from dsv3_jax.model_config import ModelConfig


def config_json(
    model: ModelConfig,
    *,
    style: Literal["released", "transformers5"],
    dtype: str,
    quantization: dict[str, Any] | None = None,
    mtp: bool = True,
) -> dict[str, Any]:
    """Sigmoid scores make a DeepSeek-V3, softmax scores a V2."""
    version = 3 if model.score_function == "sigmoid" else 2
    config = {
        "architectures": [f"DeepseekV{version}ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": model.dense_layers,
        "hidden_act": "silu",
        "hidden_size": model.width,
        "initializer_range": model.initializer_std,
        "intermediate_size": model.dense_ffn_width,
        "kv_lora_rank": model.key_value_latent,
        "max_position_embeddings": model.maximum_positions,
        "model_type": f"deepseek_v{version}",
        "moe_intermediate_size": model.expert_ffn_width,
        "n_group": model.expert_groups,
        "n_routed_experts": model.experts,
        "n_shared_experts": model.shared_experts,
        "norm_topk_prob": model.normalize_weights,
        "num_attention_heads": model.heads,
        "num_experts_per_tok": model.experts_per_token,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.heads,
        "q_lora_rank": model.query_latent,
        "qk_nope_head_dim": model.nope_head_dim,
        "qk_rope_head_dim": model.rope_head_dim,
        "rms_norm_eps": model.norm_epsilon,
        "routed_scaling_factor": model.routed_scale,
        "tie_word_embeddings": False,
        "topk_group": model.groups_per_token,
        "use_cache": True,
        "v_head_dim": model.value_head_dim,
        "vocab_size": model.vocabulary,
    }
    if version == 3:
        config["num_nextn_predict_layers"] = model.mtp_depth if mtp else 0
    if quantization is not None:
        config["quantization_config"] = quantization
    grouped = "greedy" if model.expert_groups == 1 else "group_limited_greedy"
    topk_method = "noaux_tc" if model.selection_bias else grouped
    yarn = {
        "beta_fast": model.yarn_beta_fast,
        "beta_slow": model.yarn_beta_slow,
        "factor": model.yarn_factor,
        "mscale": model.yarn_mscale,
        "mscale_all_dim": model.yarn_mscale_all_dim,
        "original_max_position_embeddings": model.yarn_original_length,
    }
    extended = model.yarn_factor != 1.0
    if style == "transformers5":
        rope = {"rope_theta": model.rope_theta, "rope_type": "yarn" if extended else "default"}
        return config | {
            "dtype": dtype,
            "head_dim": model.rope_head_dim,
            "output_router_logits": False,
            "pad_token_id": None,
            "pretraining_tp": 1,
            "qk_head_dim": model.nope_head_dim + model.rope_head_dim,
            "rope_parameters": rope | (yarn if extended else {}),
            "transformers_version": "5.23.0",
            **({"rope_interleave": True} if version == 3 else {"mlp_bias": False, "topk_method": topk_method}),
        }
    return config | {
        "auto_map": {
            "AutoConfig": f"configuration_deepseek.DeepseekV{version}Config",
            "AutoModel": f"modeling_deepseek.DeepseekV{version}Model",
            "AutoModelForCausalLM": f"modeling_deepseek.DeepseekV{version}ForCausalLM",
        },
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "pretraining_tp": 1,
        "rope_scaling": {"type": "yarn", **yarn} if extended else None,
        "rope_theta": model.rope_theta,
        "scoring_func": model.score_function,
        "seq_aux": True,
        "topk_method": topk_method,
        "torch_dtype": dtype,
        "transformers_version": "4.46.3",
    }
