"""A small model with weights large enough to have opinions, and a tokenizer that leaves some of its ids unused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import config as tiny
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.functional import abstract_trees, put_together, skeleton_of

SMALL = dataclasses.replace(
    tiny.model,
    vocabulary=320,
    width=32,
    layers=3,
    dense_ffn_width=48,
    heads=2,
    query_latent=16,
    key_value_latent=16,
    nope_head_dim=8,
    rope_head_dim=8,
    value_head_dim=8,
    experts=8,
    experts_per_token=2,
    expert_ffn_width=16,
    expert_groups=2,
    groups_per_token=1,
    mtp_depth=0,
    maximum_positions=128,
)
TEXT = "def naïve(x):\n    return 'é漢字🙂'  # déjà vu\n"


@pytest.fixture(scope="session")
def model():
    random, skeleton = np.random.default_rng(1), skeleton_of(SMALL)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(random.normal(0.0, 0.3, leaf.shape), leaf.dtype)

    return put_together(skeleton, *jax.tree.map(draw, abstract_trees(skeleton)))


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([TEXT * 20], SMALL.vocabulary - 20)
