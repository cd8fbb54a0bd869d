"""Import, then export: every tensor back bit for bit, over everything a checkpoint of the family can be."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_jax
from dsv3_jax.convert.exporting import export_checkpoint
from dsv3_jax.convert.importing import import_checkpoint
from dsv3_jax.convert.in_memory import from_hugging_face, to_hugging_face
from dsv3_jax.convert.observing import Silent
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.training.checkpoint import restore_part
from tests.reference.hf_checkpoint import dequantize, fabricate

# No dim is a multiple of 128, and every matrix has more than one block somewhere.
UNEVEN: dict[str, Any] = {
    "width": 160,
    "query_latent": 150,
    "key_value_latent": 136,
    "nope_head_dim": 60,
    "expert_ffn_width": 130,
    "dense_ffn_width": 200,
}
V2: dict[str, Any] = {
    "width": 48,
    "shared_experts": 2,
    "score_function": "softmax",
    "group_score": "max",
    "selection_bias": False,
    "normalize_weights": False,
    "mtp_depth": 0,
}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bf16": ({}, {}),
    "f32, transformers 5's config": ({}, {"dtype": "f32", "config_style": "transformers5"}),
    "f16, one file": ({}, {"dtype": "f16", "shards": 1}),
    "fp8, edge blocks": (UNEVEN, {"dtype": "fp8"}),
    "fp8, E8M0 scales": (UNEVEN, {"dtype": "fp8", "scale_dtype": "e8m0"}),
    "fp8, powers of two, scales in other shards": (
        UNEVEN,
        {"dtype": "fp8", "scale_dtype": "f32_powers", "scales_in_other_shard": True},
    ),
    "fused experts": ({}, {"fused": True}),
    "no copies of embedding and head": ({}, {"mtp_copies": False}),
    "no MTP, all blocks dense": ({"mtp_depth": 0, "dense_layers": 3}, {}),
    "two MTP layers, no dense block": ({"mtp_depth": 2, "dense_layers": 0}, {"dtype": "fp8"}),
    "no shared expert": ({"shared_experts": 0}, {}),
    "V2": (V2, {}),
    "V2-Lite": ({**V2, "query_latent": None, "expert_groups": 1, "groups_per_token": 1}, {}),
    "one layer, one head, one expert a token": ({"layers": 1, "heads": 1, "experts_per_token": 1}, {"dtype": "fp8"}),
}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def read_back(directory: Path) -> dict[str, torch.Tensor]:
    """By the library, every file by itself."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def require_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert bits(found[name]) == bits(tensor), name


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_comes_back_bit_for_bit(tmp_path, tiny_model, form):
    changes, options = FORMS[form]
    model = tiny_model(**changes)
    wanted = fabricate(tmp_path / "there", model, **{"shards": 3, **options})
    import_checkpoint(tmp_path / "there", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", shard_bytes=100_000)
    require_same(read_back(tmp_path / "back"), wanted)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == wanted.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    before = json.loads((tmp_path / "there" / "config.json").read_text())
    # TRAP C3: no quantization_config where nothing is quantised.
    assert config.get("quantization_config") == before.get("quantization_config")


@pytest.mark.parametrize("form", ["fp8, edge blocks", "fp8, E8M0 scales", "fused experts", "V2-Lite"])
def test_directory_and_checkpoint_load_as_the_same_numbers(tmp_path, tiny_model, form):
    changes, options = FORMS[form]
    tensors = dequantize(fabricate(tmp_path / "there", tiny_model(**changes), **options))
    import_checkpoint(tmp_path / "there", tmp_path / "ours")
    loaded = [dsv3_jax.load(tmp_path / place, dtype="float32")[0] for place in ("there", "ours")]
    for model in loaded:
        back = to_hugging_face(model, dtype="f32")
        if "fused" in form:
            back = _fused(back, tensors)
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)


def _fused(tensors: dict[str, np.ndarray], wanted: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Experts stacked as transformers 5 has them, gate rows before up rows."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in wanted:
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix(".gate_up_proj")
            each = range(wanted[name].shape[0])
            both = [[tensors[f"{prefix}.{e}.{side}_proj.weight"] for side in ("gate", "up")] for e in each]
            rest[name] = np.stack([np.concatenate(pair) for pair in both])
            rest[f"{prefix}.down_proj"] = np.stack([tensors[f"{prefix}.{e}.down_proj.weight"] for e in each])
    return rest


def test_types_mixed_within_a_parameter_come_back(tmp_path, tiny_model):
    """Some tools leave layers or experts out of quantisation."""
    wanted = fabricate(tmp_path / "there", tiny_model(**UNEVEN), dtype="fp8")
    kept = "model.layers.2.mlp.experts.5.down_proj.weight"
    other = "model.layers.0.input_layernorm.weight"
    plain = dequantize(wanted)
    wanted[kept] = plain[kept].to(torch.bfloat16)
    del wanted[f"{kept}_scale_inv"]
    wanted["model.layers.1.self_attn.o_proj.weight"] = plain["model.layers.1.self_attn.o_proj.weight"]
    del wanted["model.layers.1.self_attn.o_proj.weight_scale_inv"]
    wanted[other] = wanted[other].float()
    for file in (tmp_path / "there").glob("model*"):
        file.unlink()
    save_file(wanted, tmp_path / "there" / "model.safetensors")
    import_checkpoint(tmp_path / "there", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    require_same(read_back(tmp_path / "back"), wanted)


def test_minus_zero_and_a_tensor_of_zeros_come_back(tmp_path, tiny_model):
    wanted = fabricate(tmp_path / "there", tiny_model(), dtype="f32")
    wanted["lm_head.weight"][:] = -0.0
    wanted["model.layers.0.mlp.down_proj.weight"][:] = 0.0
    for file in (tmp_path / "there").glob("model*"):
        file.unlink()
    save_file(wanted, tmp_path / "there" / "model.safetensors")
    wanted["model.layers.3.shared_head.head.weight"] = wanted["lm_head.weight"].clone()
    import_checkpoint(tmp_path / "there", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    require_same(read_back(tmp_path / "back"), wanted)


def test_a_copy_that_is_none_is_told(tmp_path, tiny_model):
    wanted = fabricate(tmp_path / "there", tiny_model())
    wanted["model.layers.3.embed_tokens.weight"][3, 7] += 1.0
    save_file(wanted, tmp_path / "there" / "model.safetensors")
    told: list[str] = []

    class Listening(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    import_checkpoint(tmp_path / "there", tmp_path / "ours", observer=Listening())
    assert any("model.layers.3.embed_tokens.weight differs from model.embed_tokens.weight" in text for text in told)


def test_texts_come_along_both_ways(tmp_path, tiny_model):
    tokenizer = train_tokenizer(["naïve text " * 50], 400).to_str()
    fabricate(tmp_path / "there", tiny_model(vocabulary=400), tokenizer=tokenizer)
    (tmp_path / "there" / "chat_template.jinja").write_text("{{ bos_token }}…", encoding="utf-8")
    import_checkpoint(tmp_path / "there", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    before, after = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("there", "back"))
    # What names code, or the version of a library that wrote the file, is not kept.
    assert {name: after.get(name) for name in before if name not in ("auto_map", "transformers_version")} == {
        name: value for name, value in before.items() if name not in ("auto_map", "transformers_version")
    }
    assert "auto_map" not in after
    assert dsv3_jax.load(tmp_path / "ours")[2].to_str() == dsv3_jax.load(tmp_path / "there")[2].to_str()


def test_trap_R4_the_router_bias_stays_float32(tmp_path, tiny_model):
    wanted = fabricate(tmp_path / "there", tiny_model(), dtype="bf16")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    import_checkpoint(tmp_path / "there", tmp_path / "ours")
    for dtype in ("bf16", "fp8", "f32"):
        export_checkpoint(tmp_path / "ours", tmp_path / dtype, dtype=dtype)
        assert bits(read_back(tmp_path / dtype)[bias]) == bits(wanted[bias])
    model = dsv3_jax.load(tmp_path / "ours", dtype="bfloat16")[0]
    np.testing.assert_array_equal(model.router_biases()[0][0], wanted[bias].numpy())


def test_orbax_reads_an_imported_checkpoint_by_itself(tmp_path, tiny_model):
    tensors = fabricate(tmp_path / "there", tiny_model())
    import_checkpoint(tmp_path / "there", tmp_path / "ours")
    wanted = {"parameters": {"head": jax.ShapeDtypeStruct((36, 48), np.float32)}}
    head = restore_part(tmp_path / "ours", wanted)["parameters"]["head"]
    np.testing.assert_array_equal(head, tensors["lm_head.weight"].float().numpy().T)


def test_in_memory_as_with_files(tmp_path, tiny_model):
    tensors = fabricate(tmp_path, tiny_model(**UNEVEN), dtype="f32")
    config = json.loads((tmp_path / "config.json").read_text())
    model, shape = from_hugging_face({name: tensor.numpy() for name, tensor in tensors.items()}, config)
    assert dataclasses.replace(shape, initializer_std=0.2, remat="none") == tiny_model(**UNEVEN)
    for name, array in to_hugging_face(model, dtype="f32").items():
        np.testing.assert_array_equal(array, tensors[name].numpy(), err_msg=name)
