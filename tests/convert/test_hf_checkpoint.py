"""The fabricated Hugging Face directories of the tests: as released, and as transformers reads them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from configs.v3_671b import config as v3
from tests.reference.hf_checkpoint import dequantize, fabricate, quantizable, scale_shape, tensor_shapes
from tests.reference.released_tensors import load


def test_released_names_shapes_and_types_of_deepseek_v3():
    expected = {}
    for name, shape in tensor_shapes(v3.model).items():
        bias = name.endswith("e_score_correction_bias")
        expected[name] = ("F8_E4M3" if quantizable(name) else "F32" if bias else "BF16", list(shape))
        if quantizable(name):
            expected[f"{name}_scale_inv"] = ("F32", list(scale_shape(shape)))
    released = load()
    assert len(released) == 91_991
    assert {name: (dtype, shape) for name, dtype, shape, _ in released} == expected
    assert {file for *_, file in released} == set(range(1, 164))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("style", ["released", "transformers5"])
def test_transformers_loads_every_tensor(tiny_model, tmp_path, fused, style):
    written = fabricate(tmp_path, tiny_model(), dtype="f32", fused=fused, config_style=style, shards=3)
    model, report = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    # The MTP module's layer, which transformers passes over in silence only where it is number 61.
    assert {name.split(".")[2] for name in report.pop("unexpected_keys")} == {"3"}
    assert not any(report.values())
    loaded = model.state_dict()
    prefix = "model.layers.2.mlp.experts"
    gate_up = written.get(f"{prefix}.gate_up_proj")
    if not fused:
        gate_up = torch.stack(
            [torch.cat([written[f"{prefix}.{e}.{half}_proj.weight"] for half in ("gate", "up")]) for e in range(8)]
        )
    assert torch.equal(loaded[f"{prefix}.gate_up_proj"], gate_up)
    for name in loaded.keys() & written.keys():
        assert torch.equal(loaded[name], written[name]), name
    assert {name for name in loaded.keys() - written.keys() if ".experts." not in name} == set()


def test_transformers_loads_every_tensor_of_a_v2(tiny_model, tmp_path):
    changes = {"score_function": "softmax", "group_score": "max", "selection_bias": False, "normalize_weights": False}
    fabricate(tmp_path, tiny_model(**changes, mtp_depth=0, query_latent=None), dtype="f16")
    _, report = DeepseekV2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize("scale_dtype", ["f32", "f32_powers", "e8m0"])
def test_float8_directory(tiny_model, tmp_path, scale_dtype):
    model = tiny_model(width=132, dense_ffn_width=260)
    options = {"dtype": "fp8", "scale_dtype": scale_dtype, "shards": 3, "scales_in_other_shard": True}
    written = fabricate(tmp_path, model, **options)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    read = {name: tensor for file in set(index.values()) for name, tensor in load_file(tmp_path / file).items()}
    assert read.keys() == written.keys() == index.keys()
    assert all(read[name].dtype == written[name].dtype for name in read)
    name = "model.layers.0.mlp.down_proj.weight"
    assert index[name] != index[f"{name}_scale_inv"]
    weight, scale = written[name].to(torch.float32), written[f"{name}_scale_inv"].to(torch.float32)
    assert weight.shape == (132, 260)
    assert scale.shape == (2, 3)
    real = dequantize(written)[name]
    assert real[130, 250] == weight[130, 250] * scale[1, 1] != 0
    assert real[127, 128] == weight[127, 128] * scale[0, 1] != 0
    assert (real[128:, 256:] == 0).all()
    assert 0.05 < real.std() < 0.3
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale) == (scale_dtype != "f32")
    copy = "model.layers.3.embed_tokens.weight"
    assert torch.equal(written[copy], written["model.embed_tokens.weight"])
    bias = written["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert bias.min() < 0 < bias.max()
