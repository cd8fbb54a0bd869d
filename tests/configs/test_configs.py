"""The shipped configurations: valid, and of the published sizes."""

import importlib
import pkgutil

import jax
import pytest

import configs
from dsv3_jax.config import Config, from_json, to_json
from dsv3_jax.config_checks import check
from dsv3_jax.model.functional import abstract_trees, skeleton_of

NAMES = [module.name for module in pkgutil.iter_modules(configs.__path__)]


def _load(name: str) -> Config:
    return importlib.import_module(f"configs.{name}").config


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_can_run_and_survives_being_saved(name):
    config = _load(name)
    check(config)
    assert from_json(to_json(config)) == config


# Totals of the released weight files, selection biases included. An MTP module shares embedding and head.
@pytest.mark.parametrize(
    ("name", "main", "mtp"),
    [
        ("v3_671b", 671_026_419_200, 11_610_068_224),
        ("v2_236b", 235_741_434_880, 0),
        ("v2_lite", 15_706_484_224, 0),
    ],
)
def test_parameter_counts_are_the_published_ones(name, main, mtp):
    parameters, router_bias = abstract_trees(skeleton_of(_load(name).model))
    of_modules = parameters.pop("mtp", {}), router_bias.pop("mtp", {})
    leaves = jax.tree.leaves((parameters, router_bias, of_modules))
    assert {type(leaf) for leaf in leaves} == {jax.ShapeDtypeStruct}
    assert _count((parameters, router_bias)) == main
    assert _count(of_modules) == mtp


def test_v3_caches_576_values_a_token_and_layer():
    model = _load("v3_671b").model
    assert model.cache_width == 512 + 64
    assert model.layers * model.cache_width * 2 == 70_272


def _count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
