"""dsv3_jax.load: what comes back from disk is the model that was saved."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax
from configs.tiny import config as tiny
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import encode, train_tokenizer
from dsv3_jax.model.functional import abstract_trees, put_together, skeleton_of
from dsv3_jax.training.checkpoint import CheckpointError, Checkpoints

SMALL = dataclasses.replace(
    tiny,
    model=dataclasses.replace(
        tiny.model, vocabulary=320, width=32, layers=1, dense_layers=0, experts=8, expert_ffn_width=16, expert_groups=2
    ),
)
TOKENS = np.arange(20, dtype=np.int32).reshape(2, 10)
forward = jax.jit(lambda model, tokens_BS: model(tokens_BS))


def parts_of(seed: int) -> dict:
    """Parameters and biases that are nowhere 0, so that a part left out would show."""
    random = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(random.normal(0.0, 0.3, leaf.shape), leaf.dtype)

    parameters, router_bias = jax.tree.map(draw, abstract_trees(skeleton_of(SMALL.model)))
    return {"parameters": parameters, "router_bias": router_bias}


def model_of(seed: int, precision: str = "float32"):
    skeleton = skeleton_of(dataclasses.replace(SMALL.model, precision=precision))
    return put_together(skeleton, **parts_of(seed))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(["naïve text " * 50], SMALL.model.vocabulary)
    checkpoints = Checkpoints(workdir / "checkpoints", SMALL, tokenizer.to_str())
    for step in (5, 10):
        checkpoints.save(step, parts_of(step) | {"step": jnp.int32(step), "optimizer": jnp.ones(7)}, {})
    checkpoints.close()
    return workdir


@pytest.mark.parametrize(("place", "step"), [("", 10), ("checkpoints", 10), ("checkpoints/5", 5)])
def test_logits_are_those_of_the_model_that_was_saved(workdir, place, step):
    model, config, tokenizer = dsv3_jax.load(str(workdir / place))
    logits_BSW = forward(model, TOKENS)
    assert (logits_BSW.shape, logits_BSW.dtype) == ((2, 10, 320), jnp.float32)
    np.testing.assert_array_equal(logits_BSW, forward(model_of(step), TOKENS))
    assert config == SMALL
    spelled = "naïve <｜end▁of▁sentence｜>"
    assert tokenizer.decode(encode(tokenizer, spelled)) == spelled


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16)])
def test_another_compute_type_is_that_of_the_configuration(workdir, dtype):
    model, config, _ = dsv3_jax.load(workdir, dtype=dtype)
    assert config == dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, precision="bfloat16"))
    np.testing.assert_array_equal(forward(model, TOKENS), forward(model_of(10, "bfloat16"), TOKENS))
    assert forward(model, TOKENS).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float16", "half", "fp8", jnp.int32])
def test_no_other_compute_type(workdir, dtype):
    with pytest.raises(ConfigError, match="dtype=.* must be one of float32, bfloat16"):
        dsv3_jax.load(workdir, dtype=dtype)


def test_a_path_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "run/checkpoints/3").mkdir(parents=True)
    for path in (tmp_path / "absent", tmp_path, tmp_path / "file", tmp_path / "run"):
        with pytest.raises(CheckpointError, match=f"{path} holds no checkpoint: give a workdir") as caught:
            dsv3_jax.load(path)
        assert caught.value.exit_code == 1


def test_the_package_is_light_and_has_nothing_else():
    program = "import dsv3_jax, sys; print({'jax', 'flax', 'numpy', 'tokenizers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        dsv3_jax.lod  # noqa: B018
