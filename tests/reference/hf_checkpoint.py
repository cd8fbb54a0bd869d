"""Directories as released on Hugging Face, fabricated from the released files' layout and from no code of ours."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from dsv3_jax.model_config import ModelConfig
from tests.reference.hf_checkpoint_config import config_json

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]

BLOCK = 128
WEIGHT_STD = 0.1
TYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16, "fp8": torch.bfloat16}
# Of an MTP module's tensors, by the part before "weight", what is a copy of a tensor of the main model.
COPIES = {"embed_tokens": "model.embed_tokens.weight", "head": "lm_head.weight"}
QUANTIZED_LAYERS = {
    "q_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
}


def tensor_shapes(model: ModelConfig, *, fused: bool = False, mtp: bool = True, mtp_copies: bool = True) -> Shapes:
    """All tensors of the released layout, scales left out: a weight is [out, in].

    Args:
        fused: transformers 5's two stacked tensors for the experts of a block, instead of three for each expert.
        mtp: with the MTP modules, as layers from num_hidden_layers on.
        mtp_copies: with their copies of the embedding and the head.
    """
    width, vocabulary = model.width, model.vocabulary
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(model.layers + (model.mtp_depth if mtp else 0)):
        shapes |= _within(f"model.layers.{layer}", _block(model, dense=layer < model.dense_layers, fused=fused))
        if layer >= model.layers:
            own = {
                "enorm.weight": (width,),
                "hnorm.weight": (width,),
                "eh_proj.weight": (width, 2 * width),
                "shared_head.norm.weight": (width,),
            }
            copies = {"embed_tokens.weight": (vocabulary, width), "shared_head.head.weight": (vocabulary, width)}
            shapes |= _within(f"model.layers.{layer}", own | (copies if mtp_copies else {}))
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def quantizable(name: str) -> bool:
    """Whether released files hold it as float8: projections of attention, dense networks and experts; no router."""
    parts = name.split(".")
    return parts[-1] == "weight" and parts[-2] in QUANTIZED_LAYERS


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.ceil(size / BLOCK) for size in shape)


def fabricate(
    directory: Path,
    model: ModelConfig,
    *,
    dtype: Literal["bf16", "f32", "f16", "fp8"] = "bf16",
    fused: bool = False,
    scale_dtype: Literal["f32", "f32_powers", "e8m0"] = "f32",
    shards: int = 1,
    mtp: bool = True,
    mtp_copies: bool = True,
    seed: int = 0,
    config_style: Literal["released", "transformers5"] = "released",
    scales_in_other_shard: bool = False,
    tokenizer: str | None = None,
) -> Tensors:
    """Write a directory of random weights and return them as they lie in its files.

    Args:
        dtype: of all but the selection biases, which are float32; with fp8, bf16 for what is not quantised.
        scale_dtype: f32_powers has the values of e8m0, powers of two, in float32.
        scales_in_other_shard: a scale lies in the shard after its weight's.
        tokenizer: text of the tokenizer.json.
    """
    if fused and dtype == "fp8":
        raise ValueError("no float8 file has fused experts")
    shapes = tensor_shapes(model, fused=fused, mtp=mtp, mtp_copies=mtp_copies)
    tensors = random_tensors(shapes, dtype=dtype, scale_dtype=scale_dtype, seed=seed)
    directory.mkdir(parents=True, exist_ok=True)
    _write_tensors(directory, tensors, shards, shift_scales=scales_in_other_shard)
    quantization = None
    if dtype == "fp8":
        quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        quantization |= {"weight_block_size": [BLOCK, BLOCK]} | ({} if scale_dtype == "f32" else {"scale_fmt": "ue8m0"})
    named = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}[TYPES[dtype]]
    config = config_json(model, style=config_style, dtype=named, quantization=quantization, mtp=mtp)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    _write_json(directory / "tokenizer_config.json", {"add_bos_token": True, "add_eos_token": False})
    if tokenizer is not None:
        (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return tensors


def random_tensors(shapes: Shapes, *, dtype: str, scale_dtype: str = "f32", seed: int = 0) -> Tensors:
    """Weights of a standard deviation near 0.1, norms near 1, biases of both signs; copies equal to what they copy."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, shape in shapes.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.randn(shape, generator=generator)
            tensors[name][:2] = torch.tensor([-0.75, 0.75])
        elif len(shape) == 1:
            tensors[name] = (1.0 + 0.1 * torch.randn(shape, generator=generator)).to(TYPES[dtype])
        elif dtype == "fp8" and quantizable(name):
            tensors[name], tensors[f"{name}_scale_inv"] = _float8(shape, scale_dtype, generator)
        else:
            tensors[name] = (WEIGHT_STD * torch.randn(shape, generator=generator)).to(TYPES[dtype])
    for name in tensors:
        if name.startswith("model.layers.") and name.split(".")[-2] in COPIES:
            tensors[name] = tensors[COPIES[name.split(".")[-2]]].clone()
    return tensors


def dequantize(tensors: Tensors) -> Tensors:
    """Every weight in float32, times the scale of its block: _scale_inv multiplies, despite its name."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        result[name] = tensor.to(torch.float32)
        if f"{name}_scale_inv" in tensors:
            scale = tensors[f"{name}_scale_inv"].to(torch.float32)
            for dim, size in enumerate(tensor.shape):
                scale = scale.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)
            result[name] = result[name] * scale
    return result


def _float8(shape: tuple[int, ...], scale_dtype: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Any finite float8, so zeros of both signs, subnormals and 448; where there are more blocks, the last is zero."""
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    rms = finite.view(torch.float8_e4m3fn).to(torch.float32).pow(2).mean().sqrt()
    codes = finite[torch.randint(len(finite), shape, generator=generator)]
    blocks = scale_shape(shape)
    if math.prod(blocks) > 1:
        codes[tuple(slice((count - 1) * BLOCK, None) for count in blocks)] = 0
    exponent = torch.log2(WEIGHT_STD / rms) + 3.0 * (torch.rand(blocks, generator=generator) - 0.5)
    scale = torch.exp2(exponent if scale_dtype == "f32" else exponent.round())
    return codes.view(torch.float8_e4m3fn), scale.to(torch.float8_e8m0fnu) if scale_dtype == "e8m0" else scale


def _block(model: ModelConfig, *, dense: bool, fused: bool) -> Shapes:
    return {
        "input_layernorm.weight": (model.width,),
        "post_attention_layernorm.weight": (model.width,),
        **_within("self_attn", _attention(model)),
        **_within("mlp", _swiglu(model.width, model.dense_ffn_width) if dense else _experts(model, fused=fused)),
    }


def _attention(model: ModelConfig) -> Shapes:
    width, query_latent, key_value_latent = model.width, model.query_latent, model.key_value_latent
    queries = model.heads * (model.nope_head_dim + model.rope_head_dim)
    shapes: Shapes = {"q_proj.weight": (queries, width)}
    if query_latent is not None:
        shapes = {
            "q_a_proj.weight": (query_latent, width),
            "q_a_layernorm.weight": (query_latent,),
            "q_b_proj.weight": (queries, query_latent),
        }
    return shapes | {
        "kv_a_proj_with_mqa.weight": (key_value_latent + model.rope_head_dim, width),
        "kv_a_layernorm.weight": (key_value_latent,),
        "kv_b_proj.weight": (model.heads * (model.nope_head_dim + model.value_head_dim), key_value_latent),
        "o_proj.weight": (width, model.heads * model.value_head_dim),
    }


def _experts(model: ModelConfig, *, fused: bool) -> Shapes:
    width, hidden, experts = model.width, model.expert_ffn_width, model.experts
    shapes: Shapes = {"gate.weight": (experts, width)}
    if model.selection_bias:
        shapes["gate.e_score_correction_bias"] = (experts,)
    if fused:
        shapes |= {"experts.gate_up_proj": (experts, 2 * hidden, width), "experts.down_proj": (experts, width, hidden)}
    else:
        for expert in range(experts):
            shapes |= _within(f"experts.{expert}", _swiglu(width, hidden))
    shared = _swiglu(width, model.shared_experts * hidden) if model.shared_experts else {}
    return shapes | _within("shared_experts", shared)


def _swiglu(width: int, hidden: int) -> Shapes:
    return {
        "gate_proj.weight": (hidden, width),
        "up_proj.weight": (hidden, width),
        "down_proj.weight": (width, hidden),
    }


def _within(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _write_tensors(directory: Path, tensors: Tensors, shards: int, *, shift_scales: bool) -> None:
    weights = [name for name in tensors if not name.endswith("_scale_inv")]
    shard_of = {name: index * shards // len(weights) for index, name in enumerate(weights)}
    for name in tensors.keys() - shard_of.keys():
        shard_of[name] = (shard_of[name.removesuffix("_scale_inv")] + shift_scales) % shards
    names = [f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" for shard in range(shards)]
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    for shard in range(shards):
        held = {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}
        save_file(held, directory / names[shard], metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: names[shard] for name, shard in sorted(shard_of.items())},
    }
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
