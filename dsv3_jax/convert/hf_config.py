"""Hugging Face `config.json` of the DeepSeek-V2 and V3 family, in both directions.

Names are those of the released files and of transformers 5, defaults those of transformers 5's DeepseekV3Config and
DeepseekV2Config.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.config_checks import check_model
from dsv3_jax.convert.hf_config_export import hugging_face_config
from dsv3_jax.convert.hf_fields import (
    BLOCK,
    LATENT_NORM_EPSILON,
    REQUIRED,
    TYPES,
    V2,
    V3,
    Fields,
    HuggingFaceConfigError,
    ScaleFormat,
)
from dsv3_jax.convert.hf_rope import rope_fields
from dsv3_jax.model_config import ModelConfig

__all__ = [
    "HuggingFaceConfigError",
    "Quantization",
    "hugging_face_config",
    "model_config",
    "quantization",
    "read_config",
]

_ABSENT: dict[str, dict[str, Any]] = {
    V3: {
        "n_shared_experts": 1,
        "q_lora_rank": 1536,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
        "max_position_embeddings": 4096,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    V2: {
        "n_shared_experts": 2,
        "q_lora_rank": 1536,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "n_group": REQUIRED,
        "topk_group": REQUIRED,
        "max_position_embeddings": 2048,
        "topk_method": "greedy",
        "scoring_func": "softmax",
    },
}

# What a field may say besides being absent, and why nothing else.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "moe_layer_freq": ((1,), "must be 1: every block after the dense ones has experts"),
    "hidden_act": (("silu",), "must be 'silu'"),
    "attention_bias": ((False,), "must be false: no projection has a bias"),
    "mlp_bias": ((False,), "must be false: no projection has a bias"),
    "tie_word_embeddings": ((False, None), "must be false: the head has its own weights"),
    "rope_interleave": ((True, None), "must be true: rotary dims come in neighbouring pairs"),
    "partial_rotary_factor": ((1, None), "must be 1: all rope dims are rotated"),
    "index_topk": ((None,), "must be absent: sparse attention is not part of this model"),
    "per_layer_config": ((None,), "must be absent: all blocks have the same shape"),
}


@dataclass(frozen=True)
class Quantization:
    """Float8 weights in blocks of 128 x 128, each with a scale that multiplies it back (V3 section 3.3.2)."""

    scale_format: ScaleFormat
    """ue8m0: scales are powers of two (V3.1)."""


def read_config(path: Path) -> dict[str, Any]:
    """The object in a `config.json`.

    Raises:
        HuggingFaceConfigError: the file is missing or unreadable, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HuggingFaceConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise HuggingFaceConfigError(f"{path}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise HuggingFaceConfigError(f"{path}: holds {type(values).__name__}, must hold a JSON object")
    return values


def model_config(values: dict[str, Any], path: Path) -> ModelConfig:
    """The model that a `config.json` describes; `path` is for messages.

    `latent_norm_epsilon` is 1e-6 whatever the file says. Where the file does not name the number of MTP modules there
    are none: files of transformers 4 have neither, all others name it.

    Raises:
        HuggingFaceConfigError: not a DeepSeek-V2/V3 model, a field that is missing or of another type, or a value that
            this model cannot have.
    """
    fields = Fields(values, path)
    family = _family(fields)
    for name, (allowed, right) in _ONLY.items():
        if name in values and values[name] not in allowed:
            raise fields.refusal(name, right)
    absent = _ABSENT[family]
    heads = fields.integer("num_attention_heads")
    if values.get("num_key_value_heads") not in (None, heads):
        raise fields.refusal(
            "num_key_value_heads", f"must be num_attention_heads={heads}: latent attention has no groups"
        )
    dtype = values.get("dtype") or values.get("torch_dtype")
    model = ModelConfig(
        vocabulary=fields.integer("vocab_size"),
        width=fields.integer("hidden_size"),
        layers=fields.integer("num_hidden_layers"),
        dense_layers=fields.integer("first_k_dense_replace", absent["first_k_dense_replace"]),
        dense_ffn_width=fields.integer("intermediate_size"),
        heads=heads,
        query_latent=fields.optional_integer("q_lora_rank", absent["q_lora_rank"]),
        key_value_latent=fields.integer("kv_lora_rank"),
        nope_head_dim=fields.integer("qk_nope_head_dim"),
        rope_head_dim=fields.integer("qk_rope_head_dim"),
        value_head_dim=fields.integer("v_head_dim"),
        **_experts(fields, family),
        mtp_depth=_mtp_depth(fields, family),
        **rope_fields(values, path),
        maximum_positions=fields.integer("max_position_embeddings", absent["max_position_embeddings"]),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        latent_norm_epsilon=LATENT_NORM_EPSILON,
        initializer_std=fields.number("initializer_range", 0.02),
        precision="float32" if dtype == "float32" else "bfloat16",
    )
    try:
        check_model(model)
    except ConfigError as error:
        raise HuggingFaceConfigError(f"{path}: {error}") from error
    return model


def quantization(values: dict[str, Any], path: Path) -> Quantization | None:
    """How a `config.json` says the weights are quantised, None where it does not.

    Raises:
        HuggingFaceConfigError: anything but float8 e4m3 in blocks of 128 x 128.
    """
    top = Fields(values, path)
    if values.get("compression_config") is not None:
        raise top.refusal("compression_config", "is an unknown quantisation: only quant_method 'fp8' is read")
    if values.get("quantization_config") is None:
        return None
    fields = top.inner("quantization_config")
    for name, allowed in (
        ("quant_method", ("fp8",)),
        ("fmt", ("e4m3", None)),
        ("activation_scheme", ("dynamic", None)),
        ("weight_block_size", (BLOCK,)),
        ("scale_fmt", ("ue8m0", None)),
    ):
        if fields.values.get(name) not in allowed:
            raise fields.refusal(name, f"is an unknown quantisation: must be {json.dumps(allowed[0])}")
    return Quantization("ue8m0" if fields.values.get("scale_fmt") else "float32")


def _family(fields: Fields) -> str:
    """V3 or V2, by the first of `architectures`, or by `model_type` where there are none.

    Other model types of V3's architecture pass (kimi_k2), other model types of DeepSeek's do not.
    """
    architectures, model_type = fields.values.get("architectures"), fields.values.get("model_type")
    if architectures:
        family = architectures[0] if isinstance(architectures, list) else architectures
        own_type = TYPES.get(family) if isinstance(family, str) else None
        if own_type is None:
            raise fields.refusal("architectures", f"is not a DeepSeek-V2/V3 model: must be {V3} or {V2}")
        if model_type != own_type and str(model_type).startswith("deepseek"):
            raise fields.refusal("model_type", f"is not a DeepSeek-V2/V3 model: must be {own_type!r} for {family}")
        return family
    for family, own_type in TYPES.items():
        if model_type == own_type:
            return family
    raise fields.refusal("model_type", "is not a DeepSeek-V2/V3 model: must be 'deepseek_v3' or 'deepseek_v2'")


def _experts(fields: Fields, family: str) -> dict[str, Any]:
    """ModelConfig's fields of the MoE blocks."""
    absent = _ABSENT[family]
    method = fields.choice("topk_method", ("noaux_tc", "group_limited_greedy", "greedy"), absent["topk_method"])
    normalize = fields.boolean("norm_topk_prob", absent["norm_topk_prob"])
    scale = fields.number("routed_scaling_factor", absent["routed_scaling_factor"])
    if family == V2 and normalize and scale != 1.0:
        right = f"must be false with routed_scaling_factor={scale:g}: DeepSeek-V2's code applies one of the two only"
        raise fields.refusal("norm_topk_prob", right)
    return {
        "experts": fields.integer("n_routed_experts"),
        "experts_per_token": fields.integer("num_experts_per_tok"),
        "shared_experts": fields.optional_integer("n_shared_experts", absent["n_shared_experts"]) or 0,
        "expert_ffn_width": fields.integer("moe_intermediate_size"),
        # Plain greedy looks at no groups, whatever n_group says.
        "expert_groups": 1 if method == "greedy" else fields.integer("n_group", absent["n_group"]),
        "groups_per_token": 1 if method == "greedy" else fields.integer("topk_group", absent["topk_group"]),
        "score_function": fields.choice("scoring_func", ("sigmoid", "softmax"), absent["scoring_func"]),
        "group_score": "top2_sum" if method == "noaux_tc" else "max",
        "normalize_weights": normalize,
        "routed_scale": scale,
        "selection_bias": method == "noaux_tc",
    }


def _mtp_depth(fields: Fields, family: str) -> int:
    named = [name for name in ("num_nextn_predict_layers", "num_mtp_layers") if fields.values.get(name) is not None]
    depths = {name: fields.integer(name) for name in named}
    if len(set(depths.values())) > 1:
        raise fields.refusal("num_mtp_layers", "must be num_nextn_predict_layers, or go")
    depth = next(iter(depths.values()), 0)
    if family == V2 and depth:
        raise fields.refusal(next(iter(depths)), f"must be 0: a {V2} has no MTP modules")
    return depth
