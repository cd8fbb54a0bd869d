"""A config.json written: read back, and taken by transformers without a word."""

import dataclasses
import importlib
import json
import logging
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import configs
from dsv3_jax.convert.hf_config import (
    HuggingFaceConfigError,
    Quantization,
    hugging_face_config,
    model_config,
    quantization,
)
from dsv3_jax.model.rope import frequencies, rotation, softmax_scale
from tests.reference.released_configs import FLOAT8, R1, V2
from tests.reference.transformers_weights import _config as transformers_config

PATH = Path("model/config.json")
NAMES = [module.name for module in pkgutil.iter_modules(configs.__path__)]
YARN = {"yarn_factor": 40.0, "maximum_positions": 163840}
EXTENDED = [
    {"yarn_mscale": 0.707, "yarn_mscale_all_dim": 0.707, "rope_theta": 50000.0},
    {"yarn_mscale": 1.5, "yarn_mscale_all_dim": 0.5, "yarn_factor": 80.0, "yarn_original_length": 2048},
    {"yarn_beta_fast": 24.0, "yarn_beta_slow": 2.5, "yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0},
]
SOFTMAX = {"score_function": "softmax", "group_score": "max", "selection_bias": False, "normalize_weights": False}


def _exported(model, **options) -> dict[str, Any]:
    options = {"dtype": model.precision, "quantized": False, "mtp": True} | options
    return json.loads(json.dumps(hugging_face_config(model, **options)))


def _in_file(model):
    """What of a model a config.json holds: nothing of YaRN without YaRN, nothing of how it is computed."""
    mscale = (model.yarn_mscale, model.yarn_mscale_all_dim) if model.yarn_factor > 1 else (1.0, 1.0)
    return dataclasses.replace(model, yarn_mscale=mscale[0], yarn_mscale_all_dim=mscale[1], remat="block")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extension", [{}, *(YARN | changes for changes in EXTENDED)])
def test_a_written_model_reads_back(name, extension):
    model = dataclasses.replace(importlib.import_module(f"configs.{name}").config.model, **extension)
    assert model_config(_exported(model), PATH) == _in_file(model)
    without = _exported(model, mtp=False)
    assert model_config(without, PATH) == dataclasses.replace(_in_file(model), mtp_depth=0)


def test_fields_are_those_of_the_released_file():
    model = model_config(R1, PATH)
    written = _exported(model, quantized=True, kept=R1)
    added = {"dtype", "rope_parameters", "aux_loss_alpha", "pretraining_tp", "seq_aux"}
    assert {name: value for name, value in written.items() if name not in added} == {
        name: value for name, value in R1.items() if name not in ("auto_map", "transformers_version")
    }


@pytest.mark.parametrize("changes", [{}, *(YARN | changes for changes in EXTENDED)])
@pytest.mark.parametrize("version", [3, 2])
def test_transformers_takes_both_spellings_together(tiny_model, tmp_path, caplog, changes, version):
    if version == 2:
        changes = changes | SOFTMAX | {"mtp_depth": 0}
    model = tiny_model(rope_head_dim=16, **changes)
    (tmp_path / "config.json").write_text(json.dumps(_exported(model)))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        config = AutoConfig.from_pretrained(tmp_path)
        built = AutoModelForCausalLM.from_config(config)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    # What does not change what the model computes: origin, type, start, MTP modules.
    own = {"_name_or_path", "transformers_version", "architectures", "dtype", "initializer_range"}
    own.add("num_nextn_predict_layers")
    for name, value in transformers_config(model).to_dict().items():
        if name == "rope_parameters":
            assert {part: config.rope_parameters[part] for part in value} == value
        elif name not in own:
            assert getattr(config, name) == value, name
    rotary, attention = built.model.rotary_emb, built.model.layers[0].self_attn
    np.testing.assert_allclose(rotary.inv_freq.numpy(), frequencies(model), rtol=1e-6)
    cos, _ = rotation(model, np.zeros((1, 1), np.int32))
    np.testing.assert_allclose(rotary.attention_scaling, cos[0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(attention.scaling, softmax_scale(model), rtol=1e-6)


def test_trap_C3_only_quantised_weights_have_a_quantisation():
    model = model_config(R1, PATH)
    assert "quantization_config" not in _exported(model, kept=R1)
    assert _exported(model, quantized=True)["quantization_config"] == FLOAT8
    powers = _exported(model, quantized=True, scale_format="ue8m0")
    assert powers["quantization_config"] == FLOAT8 | {"scale_fmt": "ue8m0"}
    assert quantization(powers, PATH) == Quantization("ue8m0")


def test_an_imported_file_keeps_what_is_not_stale():
    kept = V2 | {"head_dim": 64, "qk_head_dim": 192, "num_mtp_layers": 1, "eos_token_id": [1, 2]}
    model = model_config(V2, PATH)
    written = _exported(dataclasses.replace(model, yarn_factor=1.0), kept=kept)
    assert written["eos_token_id"] == [1, 2]
    assert written["rope_scaling"] is None
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000}
    assert not written.keys() & {"auto_map", "transformers_version", "num_mtp_layers", "head_dim", "qk_head_dim"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_norm_epsilon": 1e-5}, "latent_norm_epsilon=1e-05"),
        ({"mtp_input": "residual"}, "mtp_input='residual'"),
        ({"group_score": "max"}, "group_score='max'"),
        ({"experts": 4, "group_score": "max", "groups_per_token": 4}, "expert_groups=4"),
        ({"yarn_factor": 4.0, "yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.0}, "yarn_mscale=0.7"),
        (SOFTMAX | {"group_score": "top2_sum"}, "group_score='top2_sum'"),
        (SOFTMAX | {"selection_bias": True}, "selection_bias=True"),
        (SOFTMAX | {"normalize_weights": True}, "normalize_weights=True"),
        (SOFTMAX, "mtp_depth=1"),
        (SOFTMAX | {"width": 35, "mtp_depth": 0}, "width=35"),
    ],
)
def test_what_the_format_cannot_express_is_refused_by_name(tiny_model, changes, message):
    with pytest.raises(HuggingFaceConfigError, match=f"^model.{message}[^\n]*$"):
        _exported(tiny_model(**changes))


def test_without_mtp_modules_their_fields_do_not_matter(tiny_model):
    assert _exported(tiny_model(mtp_input="residual"), mtp=False)["num_nextn_predict_layers"] == 0
    assert "num_nextn_predict_layers" not in _exported(tiny_model(**SOFTMAX), mtp=False)


def test_a_sigmoid_model_without_bias_is_a_v3_of_zero_biases(tiny_model):
    written = _exported(tiny_model(selection_bias=False, expert_groups=1, groups_per_token=1, group_score="max"))
    assert written["topk_method"] == "noaux_tc"
    assert model_config(written, PATH).selection_bias
