"""The configuration: every mistake is refused by name, every file in configs/ is whole, JSON brings it back."""

import dataclasses
import importlib
import json
import math
from typing import Any

import pytest

from configs.tiny import config as tiny
from dsv3_jax.command_line import config_names
from dsv3_jax.config import Config, ConfigError, from_json, to_json
from dsv3_jax.config_checks import check, check_model, divisors


def _changed(changes: dict[str, Any]) -> Config:
    config = tiny
    for name, value in changes.items():
        section, dot, field = name.partition(".")
        value = dataclasses.replace(getattr(config, section), **{field: value}) if dot else value
        config = dataclasses.replace(config, **{section: value})
    return config


POSITIVE = (
    "model.vocabulary model.width model.layers model.dense_ffn_width model.heads model.query_latent "
    "model.key_value_latent model.nope_head_dim model.rope_head_dim model.value_head_dim model.experts "
    "model.experts_per_token model.expert_ffn_width model.expert_groups model.groups_per_token model.maximum_positions "
    "model.rope_theta model.norm_epsilon model.latent_norm_epsilon model.initializer_std model.routed_scale "
    "training.tokens training.sequence_length training.batch_size training.microbatches training.log_interval "
    "optimizer.learning_rate optimizer.epsilon optimizer.clip_norm checkpoint.interval checkpoint.keep"
).split()
NOT_NEGATIVE = (
    "model.dense_layers model.shared_experts model.mtp_depth training.validation_interval training.sample_tokens "
    "optimizer.warmup_steps data.validation_share data.fill_in_the_middle_rate loss.bias_until loss.mtp_weight_until "
    "optimizer.beta1 optimizer.beta2 seed"
).split()
BROKEN = [
    *({name: 0} for name in POSITIVE),
    *({name: -1} for name in POSITIVE + NOT_NEGATIVE),
    {"model.rope_head_dim": 7},
    {"model.dense_layers": 5},
    {"model.expert_groups": 3},
    {"model.expert_groups": 16},  # one expert a group has no top two
    {"model.groups_per_token": 5},
    {"model.experts_per_token": 9},  # two groups of four
    {"model.experts_per_token": 17, "model.groups_per_token": 4},
    {"model.yarn_factor": 0.5},
    {"model.yarn_factor": math.nan},
    {"training.microbatches": 3},
    {"training.tokens": 8 * 256 - 1},
    {"training.sequence_length": 4097},
    {"training.sequence_length": 1},  # nothing for the MTP module to predict
    {"data.validation_share": 1.5},
    {"data.validation_share": math.nan},
    {"data.fill_in_the_middle_rate": 1.1},
    {"data.path": ""},
    {"optimizer.learning_rate": math.nan},
    {"optimizer.constant_until": 0.99},
    {"optimizer.cosine_until": 0.5},
    {"optimizer.first_tail_until": 1.5},
    {"optimizer.beta1": 1.5},
    {"loss.bias_until": 1.5},
    {"loss.mtp_weight_until": 1.5},
    {"seed": 2**32},
]


@pytest.mark.parametrize("changes", BROKEN, ids=str)
def test_a_value_that_cannot_run_is_refused_by_its_name(changes):
    with pytest.raises(ConfigError) as caught:
        check(_changed(changes))
    message, (name, value) = str(caught.value), next(iter(changes.items()))
    assert name.rpartition(".")[2] in message and name.partition(".")[0] in message
    assert str(value) in message and "\n" not in message and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"model.dense_layers": 4},
        {"model.dense_layers": 0},
        {"model.shared_experts": 0},
        {"model.query_latent": None},
        {"model.mtp_depth": 0, "training.sequence_length": 1},
        {"model.experts_per_token": 8},
        {"model.expert_groups": 16, "model.group_score": "max", "model.groups_per_token": 4},
        {"model.expert_groups": 1, "model.groups_per_token": 1, "model.experts_per_token": 16},
        {"training.microbatches": 8},
        {"training.tokens": 8 * 256},
        {"training.sequence_length": 4096},
        {"optimizer.warmup_steps": 0},
        {"optimizer.constant_until": 1.0, "optimizer.cosine_until": 1.0, "optimizer.first_tail_until": 1.0},
        {"seed": 2**32 - 1},
    ],
    ids=str,
)
def test_the_last_value_that_can_run_is_not_refused(changes):
    check(_changed(changes))


def test_a_model_shape_is_refused_on_its_own_too():
    with pytest.raises(ConfigError, match="model.rope_head_dim=7 must be even"):
        check_model(dataclasses.replace(tiny.model, rope_head_dim=7))


def test_a_refusal_says_what_would_be_right():
    for changes, advice in (
        ({"model.expert_groups": 3}, "[1, 2, 4, 8, 16]"),
        ({"training.microbatches": 3}, "[1, 2, 4, 8]"),
        ({"training.tokens": 5}, "2048"),
        ({"model.experts_per_token": 9}, "8"),
    ):
        with pytest.raises(ConfigError) as caught:
            check(_changed(changes))
        assert advice in str(caught.value)
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("name", config_names())
def test_every_file_in_configs_is_a_whole_run_with_a_command_to_start_it(name):
    module = importlib.import_module(f"configs.{name}")
    assert isinstance(module.config, Config)
    check(module.config)
    assert from_json(to_json(module.config)) == module.config
    assert f"python train.py --config={name}" in module.__doc__
    assert module.config.training.steps > module.config.optimizer.warmup_steps


def test_nothing_of_a_configuration_can_be_assigned():
    for part in (tiny, *(getattr(tiny, field.name) for field in dataclasses.fields(tiny) if field.name != "seed")):
        field = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, None)


def test_json_holds_every_field_and_brings_back_every_value():
    config = _changed({"model.query_latent": None, "optimizer.learning_rate": 1e-7 / 3, "seed": 5, "data.path": "é\n"})
    values = json.loads(to_json(config))
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            assert values[field.name].keys() == {inner.name for inner in dataclasses.fields(value)}
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        to_json(tiny).replace('"width"', '"widht"'),
        to_json(tiny).replace(f'"width": {tiny.model.width},', ""),
        to_json(tiny).replace('"seed"', '"sead"'),
        to_json(tiny.model),
    ],
    ids=[
        "empty",
        "cut off",
        "a list",
        "no sections",
        "unknown field",
        "missing field",
        "unknown section",
        "one section",
    ],
)
def test_text_that_is_no_configuration_is_refused(text):
    with pytest.raises(ConfigError, match="not a saved configuration of this version"):
        from_json(text)


def test_derived_shapes_are_those_of_the_released_model():
    v3 = importlib.import_module("configs.v3_671b").config.model
    assert (v3.moe_layers, v3.query_key_head_dim, v3.cache_width) == (58, 192, 576)
