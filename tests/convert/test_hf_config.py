"""A config.json read: released files, files of transformers 5, and what is refused."""

import copy
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from dsv3_jax.convert.hf_config import HuggingFaceConfigError, Quantization, model_config, quantization, read_config
from tests.reference.released_configs import FLOAT8, R1, V2, V2_LITE

PATH = Path("model/config.json")
NO_LOGIT_SCALE = {"yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0}
NO_BIAS = {"group_score": "max", "selection_bias": False}
RELEASED = [("v3_671b", R1), ("v2_236b", V2), ("v2_lite", V2_LITE)]


def _as_transformers(values: dict[str, Any]) -> PreTrainedConfig:
    # transformers completes the dict of rope fields that it is given, in place.
    return AutoConfig.for_model(**copy.deepcopy(values))


@pytest.mark.parametrize(("name", "values"), RELEASED)
def test_released_files_are_the_shipped_configurations(name, values):
    shipped = dataclasses.replace(
        importlib.import_module(f"configs.{name}").config.model, yarn_factor=40.0, initializer_std=0.02
    )
    assert model_config(values, PATH) == shipped
    assert quantization(values, PATH) == (Quantization("float32") if name == "v3_671b" else None)


@pytest.mark.parametrize(("name", "values"), RELEASED)
def test_trap_Y8_files_that_transformers_5_wrote_read_the_same(tmp_path, name, values):
    _as_transformers(values).save_pretrained(tmp_path)
    saved = read_config(tmp_path / "config.json")
    assert "rope_parameters" in saved and "rope_scaling" not in saved
    assert model_config(saved, PATH) == model_config(values, PATH)
    assert quantization(saved, PATH) == quantization(values, PATH)


def test_trap_A1_the_latent_norms_keep_their_own_epsilon():
    model = model_config(R1 | {"rms_norm_eps": 1e-5}, PATH)
    assert (model.norm_epsilon, model.latent_norm_epsilon) == (1e-5, 1e-6)
    small = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 32}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "quantization_config": None, "rms_norm_eps": 1e-5}
    built = AutoModelForCausalLM.from_config(_as_transformers(R1 | small))
    assert built.model.norm.variance_epsilon == 1e-5
    assert built.model.layers[0].self_attn.kv_a_layernorm.variance_epsilon == 1e-6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "kimi_k2", "n_shared_experts": None}, {"shared_experts": 0}),
        ({"architectures": None}, {}),
        ({"num_key_value_heads": None, "torch_dtype": "float32"}, {"precision": "float32"}),
        ({"torch_dtype": "float16"}, {}),
        ({"rope_scaling": None}, {"yarn_factor": 1.0}),
        ({"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}}, NO_LOGIT_SCALE),
        ({"rope_scaling": R1["rope_scaling"] | {"mscale_all_dim": 0}}, NO_LOGIT_SCALE),
        ({"topk_method": "greedy"}, NO_BIAS | {"expert_groups": 1, "groups_per_token": 1}),
        ({"topk_method": "group_limited_greedy"}, NO_BIAS),
    ],
)
def test_variants_of_a_file(changes, expected):
    assert model_config(R1 | changes, PATH) == dataclasses.replace(model_config(R1, PATH), **expected)


def test_trap_R9_absent_fields_have_the_defaults_of_their_family():
    optional = {
        "topk_method",
        "scoring_func",
        "norm_topk_prob",
        "routed_scaling_factor",
        "rms_norm_eps",
        "moe_layer_freq",
    }
    for values in (R1, V2_LITE):
        bare = {name: value for name, value in values.items() if name not in optional}
        assert model_config(bare, PATH) == model_config(values, PATH)
    bare = {name: value for name, value in R1.items() if name != "num_nextn_predict_layers"}
    assert model_config(bare, PATH).mtp_depth == 0


REFUSED = [
    ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "architectures=.*not a DeepSeek-V2/V3 model"),
    ({"model_type": "llama", "architectures": None}, 'model_type="llama" is not a DeepSeek-V2/V3 model'),
    ({"model_type": "deepseek_v32"}, "model_type=.*not a DeepSeek-V2/V3 model"),
    ({"index_topk": 2048}, "index_topk=2048 must be absent"),
    ({"moe_layer_freq": 2}, "moe_layer_freq=2 must be 1"),
    ({"hidden_act": "gelu"}, 'hidden_act="gelu" must be'),
    ({"attention_bias": True}, "attention_bias=true must be false"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=true must be false"),
    ({"rope_interleave": False}, "rope_interleave=false must be true"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8 must be num_attention_heads=128"),
    ({"hidden_size": "abc"}, 'hidden_size="abc" must be a whole number'),
    ({"hidden_size": True}, "hidden_size=true must be a whole number"),
    ({"kv_lora_rank": None}, "kv_lora_rank=null must be a whole number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=NaN must be a number"),
    ({"scoring_func": "tanh"}, 'scoring_func="tanh" must be "sigmoid" or "softmax"'),
    ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
    ({"n_group": 7}, "model.expert_groups=7 must divide"),
    ({"num_mtp_layers": 2}, "num_mtp_layers=2 must be num_nextn_predict_layers"),
    ({"rope_scaling": {"type": "linear", "factor": 4}}, r'rope_scaling.type="linear" must be "default" or "yarn"'),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
    ({"rope_scaling": {"rope_type": "default", "factor": 4}}, "rope_scaling.factor=4 is not a field of rope type"),
    ({"rope_scaling": R1["rope_scaling"] | {"attention_factor": 2.0}}, "attention_factor=2.0 is not a field"),
    ({"rope_scaling": R1["rope_scaling"] | {"truncate": False}}, "truncate=false must go"),
    ({"rope_scaling": R1["rope_scaling"] | {"mscale": 0.7, "mscale_all_dim": 0}}, "mscale=0.7 must come with"),
    ({"rope_scaling": R1["rope_scaling"] | {"beta_slow": 0}}, "beta_slow=0 must be above 0"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}, "rope_parameters=.* must say the same"),
    ({"rope_parameters": R1["rope_scaling"] | {"rope_theta": 5e4}}, "rope_theta=10000 must be rope_parameters.rope_th"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_the_model_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(HuggingFaceConfigError, match=f"^model/config.json: .*{message}[^\n]*$"):
        model_config(R1 | changes, PATH)


def test_a_missing_field_and_v2s_own_refusals():
    for values, name in ((R1, "hidden_size"), (R1, "v_head_dim"), (V2, "n_group")):
        with pytest.raises(HuggingFaceConfigError, match=f"{name} is missing: it must be a whole number"):
            model_config({key: value for key, value in values.items() if key != name}, PATH)
    with pytest.raises(HuggingFaceConfigError, match="norm_topk_prob=true must be false with routed_scaling_factor=16"):
        model_config(V2 | {"norm_topk_prob": True}, PATH)
    assert model_config(V2_LITE | {"norm_topk_prob": True}, PATH).normalize_weights
    with pytest.raises(HuggingFaceConfigError, match="num_nextn_predict_layers=1 must be 0"):
        model_config(V2 | {"num_nextn_predict_layers": 1}, PATH)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("[1]", "holds list"), ("\udcff", "is not JSON")],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(HuggingFaceConfigError, match=f"config.json: {message}"):
        read_config(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "gptq"},
        {"quant_method": "compressed-tensors", "format": "int4"},
        {"fmt": "e5m2"},
        {"weight_block_size": [64, 64]},
        {"weight_block_size": None},
        {"activation_scheme": "static"},
        {"scale_fmt": "ue4m3"},
    ],
)
def test_unknown_quantisations_are_refused_by_name(changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(HuggingFaceConfigError) as refused:
        quantization({"quantization_config": FLOAT8 | changes}, PATH)
    assert f"quantization_config.{name}={json.dumps(value)} is an unknown quantisation: must be" in str(refused.value)
