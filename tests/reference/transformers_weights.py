"""One of our models as a transformers DeepseekV3ForCausalLM or DeepseekV2ForCausalLM with the same weights."""

import numpy as np
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import MtpModel

from dsv3_jax.model_config import ModelConfig
from tests.reference.weights import Tree, layer


def transformers_model(model: ModelConfig, parameters: Tree, router_bias: Tree) -> PreTrainedModel:
    """A float32 model with eager attention: V3's class with sigmoid scores, V2's with softmax scores."""
    config = _config(model)
    kind = DeepseekV3ForCausalLM if model.score_function == "sigmoid" else DeepseekV2ForCausalLM
    built = kind(config).to(torch.float32).eval()
    weights = transformers_weights(model, parameters) | _biases(model, router_bias)
    built.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=True)
    return built


def transformers_weights(model: ModelConfig, parameters: Tree) -> dict[str, np.ndarray]:
    """The main model's parameters, or a tree of their gradients, under transformers' names and layouts."""
    named = {
        "model.embed_tokens.weight": parameters["embedding"],
        "model.norm.weight": parameters["norm"]["gain"],
        "lm_head.weight": np.asarray(parameters["head"]).T,
    }
    for index in range(model.layers):
        dense = index < model.dense_layers
        name, first = ("dense_blocks", 0) if dense else ("moe_blocks", model.dense_layers)
        named |= _within(f"model.layers.{index}", _block(layer(parameters[name], index - first), dense=dense))
    return {name: np.ascontiguousarray(value) for name, value in named.items()}


def transformers_mtp_states(
    model: ModelConfig, parameters: Tree, router_bias: Tree, tokens_BS: np.ndarray, following_BSk: np.ndarray
) -> list[np.ndarray]:
    """What transformers' MTP layers hand to the shared head, [B, S, D] each, token k + 1 after each position given."""
    main = transformers_model(model, parameters, router_bias)
    mtp = MtpModel(main, model.mtp_depth).to(torch.float32).eval()
    for module, ours, bias in zip(mtp.layers, parameters["mtp"].values(), router_bias["mtp"].values(), strict=True):
        weights = {
            "enorm.weight": ours["embedding_norm"]["gain"],
            "hnorm.weight": ours["hidden_norm"]["gain"],
            "eh_proj.weight": ours["projection"].T,
            "post_norm.weight": ours["norm"]["gain"],
            **_within("mtp_block", _block(ours["block"], dense=False)),
            "mtp_block.mlp.gate.e_score_correction_bias": bias["block"]["feed_forward"]["router"]["bias"],
        }
        module.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=True)
    states = []
    with torch.no_grad():
        state_BSD = main.model(torch.tensor(tokens_BS)).last_hidden_state
        for depth in range(model.mtp_depth):
            # transformers places a state at the position of the token it embeds; only distances matter.
            positions = torch.arange(tokens_BS.shape[1])[None] + depth + 1
            following_BS = torch.tensor(following_BSk[..., depth])
            state_BSD = mtp.forward_layer(depth, state_BSD, positions, None, input_ids=following_BS)
            states.append(state_BSD.numpy())
    return states


def _block(block: Tree, *, dense: bool) -> Tree:
    return {
        "input_layernorm.weight": block["attention_norm"]["gain"],
        "post_attention_layernorm.weight": block["feed_forward_norm"]["gain"],
        **_within("self_attn", _attention(block["attention"])),
        **_within("mlp", _swiglu(block["feed_forward"]) if dense else _experts(block["feed_forward"])),
    }


def _attention(ours: Tree) -> Tree:
    theirs = {
        "kv_a_proj_with_mqa.weight": ours["key_value_down"].T,
        "kv_a_layernorm.weight": ours["key_value_norm"]["gain"],
        "kv_b_proj.weight": _columns(ours["key_value_up"]),
        "o_proj.weight": ours["output"].reshape(-1, ours["output"].shape[-1]).T,
    }
    if "query" in ours:
        return theirs | {"q_proj.weight": _columns(ours["query"])}
    return theirs | {
        "q_a_proj.weight": ours["query_down"].T,
        "q_a_layernorm.weight": ours["query_norm"]["gain"],
        "q_b_proj.weight": _columns(ours["query_up"]),
    }


def _columns(weight: np.ndarray) -> np.ndarray:
    """[in, heads, dim] as torch's [out, in], head by head."""
    return weight.reshape(weight.shape[0], -1).T


def _swiglu(ours: Tree) -> Tree:
    return {
        "gate_proj.weight": ours["gate_up"][:, 0].T,
        "up_proj.weight": ours["gate_up"][:, 1].T,
        "down_proj.weight": ours["down"].T,
    }


def _experts(ours: Tree) -> Tree:
    gate_up = ours["experts"]["gate_up"]
    experts, width, _, hidden = gate_up.shape
    return {
        "gate.weight": ours["router"]["weight"].T,
        "experts.gate_up_proj": gate_up.transpose(0, 2, 3, 1).reshape(experts, 2 * hidden, width),
        "experts.down_proj": ours["experts"]["down"].transpose(0, 2, 1),
        **_within("shared_experts", _swiglu(ours["shared"])),
    }


def _biases(model: ModelConfig, router_bias: Tree) -> dict[str, np.ndarray]:
    if not model.selection_bias:
        return {}
    stacked = router_bias["moe_blocks"]["feed_forward"]["router"]["bias"]
    name = "model.layers.{}.mlp.gate.e_score_correction_bias"
    return {name.format(model.dense_layers + index): bias for index, bias in enumerate(stacked)}


def _within(prefix: str, parts: Tree) -> Tree:
    return {f"{prefix}.{name}": value for name, value in parts.items()}


def _config(model: ModelConfig) -> PreTrainedConfig:
    shared = {
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "intermediate_size": model.dense_ffn_width,
        "moe_intermediate_size": model.expert_ffn_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "n_shared_experts": model.shared_experts,
        "n_routed_experts": model.experts,
        "routed_scaling_factor": model.routed_scale,
        "kv_lora_rank": model.key_value_latent,
        "q_lora_rank": model.query_latent,
        "qk_rope_head_dim": model.rope_head_dim,
        "v_head_dim": model.value_head_dim,
        "qk_nope_head_dim": model.nope_head_dim,
        "n_group": model.expert_groups,
        "topk_group": model.groups_per_token,
        "num_experts_per_tok": model.experts_per_token,
        "first_k_dense_replace": model.dense_layers,
        "norm_topk_prob": model.normalize_weights,
        "max_position_embeddings": model.maximum_positions,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": _rope(model),
        "attn_implementation": "eager",
    }
    if model.score_function == "sigmoid":
        return DeepseekV3Config(**shared)
    return DeepseekV2Config(**shared, topk_method="greedy" if model.expert_groups == 1 else "group_limited_greedy")


def _rope(model: ModelConfig) -> Tree:
    if model.yarn_factor == 1.0:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": model.rope_theta,
        "factor": model.yarn_factor,
        "original_max_position_embeddings": model.yarn_original_length,
        "beta_fast": model.yarn_beta_fast,
        "beta_slow": model.yarn_beta_slow,
        "mscale": model.yarn_mscale,
        "mscale_all_dim": model.yarn_mscale_all_dim,
    }
