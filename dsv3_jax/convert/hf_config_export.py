"""What `config.json` an exported model gets."""

from typing import Any, Literal

from dsv3_jax.convert.hf_fields import (
    BLOCK,
    LATENT_NORM_EPSILON,
    TYPES,
    V2,
    V3,
    HuggingFaceConfigError,
    ScaleFormat,
)
from dsv3_jax.convert.hf_rope import hugging_face_rope
from dsv3_jax.model_config import ModelConfig

DTypeName = Literal["bfloat16", "float32", "float16"]

# Of an imported config.json, what is no longer true of what is exported. All else that is not written anew stays.
_NOT_KEPT = {
    "_name_or_path",
    "auto_map",
    "compression_config",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "partial_rotary_factor",
    "qk_head_dim",
    "quantization_config",
    "transformers_version",
}


def hugging_face_config(
    model: ModelConfig,
    *,
    dtype: DTypeName,
    quantized: bool,
    scale_format: ScaleFormat = "float32",
    mtp: bool,
    kept: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The `config.json` of a model for transformers, vLLM and DeepSeek's own code, old and new spellings side by side.

    A sigmoid model is a DeepseekV3ForCausalLM, which has a selection bias: where the model has none, the exporter must
    write zeros, and the file reads back as a model with a bias. A softmax model is a DeepseekV2ForCausalLM.

    Args:
        dtype: of the weights that are not quantised.
        mtp: whether the MTP modules are exported too.
        kept: the `config.json` that the model was imported with, or other fields to add such as the token ids: what is
            neither a field of the model nor stale is carried over.

    Raises:
        HuggingFaceConfigError: names the field of the model that the format cannot express.
    """
    family = _exported_family(model, mtp=mtp)
    result = _fields(model, family) | {"dtype": dtype, "torch_dtype": dtype}
    if family == V3:
        result["num_nextn_predict_layers"] = model.mtp_depth if mtp else 0
    if quantized:
        result["quantization_config"] = _quantization_config(scale_format)
    usual = {"attention_dropout": 0.0, "aux_loss_alpha": 0.001, "pretraining_tp": 1, "seq_aux": True, "use_cache": True}
    carried = {name: value for name, value in (kept or {}).items() if name not in _NOT_KEPT}
    return result | {name: value for name, value in (usual | carried).items() if name not in result}


def _fields(model: ModelConfig, family: str) -> dict[str, Any]:
    greedy = "greedy" if model.expert_groups == 1 else "group_limited_greedy"
    return {
        "architectures": [family],
        "model_type": TYPES[family],
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "first_k_dense_replace": model.dense_layers,
        "intermediate_size": model.dense_ffn_width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "q_lora_rank": model.query_latent,
        "kv_lora_rank": model.key_value_latent,
        "qk_nope_head_dim": model.nope_head_dim,
        "qk_rope_head_dim": model.rope_head_dim,
        "v_head_dim": model.value_head_dim,
        "n_routed_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
        "n_shared_experts": model.shared_experts,
        "moe_intermediate_size": model.expert_ffn_width,
        "moe_layer_freq": 1,
        "n_group": model.expert_groups,
        "topk_group": model.groups_per_token,
        "scoring_func": model.score_function,
        "topk_method": "noaux_tc" if family == V3 else greedy,
        "norm_topk_prob": model.normalize_weights,
        "routed_scaling_factor": model.routed_scale,
        **hugging_face_rope(model),
        "max_position_embeddings": model.maximum_positions,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.initializer_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "ep_size": 1,
    }


def _quantization_config(scale_format: ScaleFormat) -> dict[str, Any]:
    written = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    return written | ({"scale_fmt": "ue8m0"} if scale_format == "ue8m0" else {})


def _exported_family(model: ModelConfig, *, mtp: bool) -> str:
    """V3 for sigmoid scores, V2 for softmax, where transformers then computes what the model does."""
    family = V3 if model.score_function == "sigmoid" else V2
    # The score of a group does not matter where all are kept.
    group_score = model.group_score if model.groups_per_token < model.expert_groups else None
    if model.latent_norm_epsilon != LATENT_NORM_EPSILON:
        raise _inexpressible(
            model, "latent_norm_epsilon", f"must be {LATENT_NORM_EPSILON}: config.json has no field for it"
        )
    if mtp and model.mtp_depth and model.mtp_input != "final_norm":
        raise _inexpressible(model, "mtp_input", "must be 'final_norm' to export MTP modules: others feed them that")
    if family == V3:
        if group_score == "max":
            raise _inexpressible(model, "group_score", f"must be 'top2_sum' with score_function='sigmoid' in a {V3}")
        if model.experts // model.expert_groups < 2:
            raise _inexpressible(model, "expert_groups", f"must leave at least 2 experts a group in a {V3}")
        return family
    if group_score == "top2_sum":
        raise _inexpressible(model, "group_score", f"must be 'max' with score_function='softmax' in a {V2}")
    if model.selection_bias:
        raise _inexpressible(model, "selection_bias", f"must be False with score_function='softmax': a {V2} has none")
    if model.normalize_weights:
        raise _inexpressible(model, "normalize_weights", f"must be False in a {V2}: transformers does not normalise")
    if mtp and model.mtp_depth:
        raise _inexpressible(model, "mtp_depth", f"must be 0, or be left out of the export: a {V2} has no MTP modules")
    if model.width % model.heads:
        raise _inexpressible(
            model, "width", f"must be a multiple of heads={model.heads}: transformers asks it of a {V2}"
        )
    return family


def _inexpressible(model: ModelConfig, name: str, right: str) -> HuggingFaceConfigError:
    return HuggingFaceConfigError(f"model.{name}={getattr(model, name)!r} cannot be exported: {right}")
