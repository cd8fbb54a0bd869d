"""A small model with weights large enough to have opinions, its tokenizer, and a configuration that samples from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import config as tiny
from dsv3_jax.config import Config
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.grpo_config import GRPOConfig
from dsv3_jax.model.functional import abstract_trees, skeleton_of

MODEL = dataclasses.replace(
    tiny.model, vocabulary=320, width=16, layers=2, dense_layers=0, heads=2, query_latent=8, key_value_latent=8,
    nope_head_dim=4, rope_head_dim=4, value_head_dim=4, experts=8, experts_per_token=2, expert_ffn_width=8,
    expert_groups=4, groups_per_token=2, mtp_depth=1, maximum_positions=128,
)  # fmt: skip


@pytest.fixture(scope="session")
def config() -> Config:
    """Eight prompts of at most 10 tokens, two responses of at most 12 to each, all learnt from in one update."""
    return dataclasses.replace(
        tiny,
        model=MODEL,
        data=dataclasses.replace(tiny.data, kind="rollouts"),
        training=dataclasses.replace(tiny.training, tokens=10 * 16 * 32, sequence_length=32, batch_size=16),
        grpo=GRPOConfig(prompts=8, group_size=2, prompt_tokens=10, max_new_tokens=12, temperature=0.7),
    )


@pytest.fixture(scope="session")
def trees():
    """`parameters` and `router_bias` of the model."""
    random = np.random.default_rng(1)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(random.normal(0.0, 0.3, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, abstract_trees(skeleton_of(MODEL)))


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["What is 3 + 4? <think>3 + 4 = 7</think><answer>7</answer>\n" * 20], MODEL.vocabulary - 20)
