"""Frequencies, rotation and softmax scale against complex numbers in float64 and the released models' figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.rope import frequencies, rotate, rotation, softmax_scale
from tests.reference import rope as reference

V3_YARN = {"rope_head_dim": 64, "nope_head_dim": 128, "yarn_factor": 40.0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 50000.0},
        V3_YARN,
        {"yarn_factor": 4.0, "rope_head_dim": 32, "yarn_original_length": 1000, "yarn_beta_fast": 16.0},
        # The ramp from pair 2 would end at 8: it is clamped to rope_head_dim - 1 = 7, not to the last pair, 3.
        {"yarn_factor": 8.0, "rope_theta": 100.0, "yarn_original_length": 3000, "yarn_beta_slow": 0.1},
    ],
    ids=["plain", "theta", "v3", "short_original", "clamped"],
)
def test_frequencies_are_those_of_the_reference(tiny_model, changes):
    model = tiny_model(**changes)
    wanted = [reference.pair_frequency(model, pair) for pair in range(model.rope_head_dim // 2)]
    np.testing.assert_allclose(frequencies(model), wanted, rtol=1e-12)


def test_frequencies_are_the_released_ones(tiny_model):
    found = frequencies(tiny_model(**V3_YARN))
    plain = frequencies(tiny_model(rope_head_dim=64))
    np.testing.assert_array_equal(found[:11], plain[:11])
    np.testing.assert_allclose(found[23:], plain[23:] / 40.0, rtol=1e-12)
    np.testing.assert_allclose(found[[11, 16, 22]], [0.0390069266, 0.0055, 1.7782794e-4], rtol=1e-7)


@pytest.mark.parametrize(
    ("coefficient", "wanted"), [(1.0, 0.1352337789), (0.707, 0.1147213868), (0.0, 192**-0.5)], ids=["v3", "v2", "none"]
)
def test_trap_Y1_softmax_scale_has_the_all_dim_factor_squared(tiny_model, coefficient, wanted):
    model = tiny_model(**V3_YARN, yarn_mscale=0.3, yarn_mscale_all_dim=coefficient)
    assert softmax_scale(model) == pytest.approx(wanted, rel=1e-8)


def test_trap_Y2_cos_and_sin_carry_the_ratio_of_the_mscales(tiny_model):
    position = jnp.zeros((1, 1), jnp.int32)
    equal, _ = rotation(tiny_model(**V3_YARN, yarn_mscale=0.707, yarn_mscale_all_dim=0.707), position)
    np.testing.assert_array_equal(equal, 1.0)
    unequal, _ = rotation(tiny_model(**V3_YARN, yarn_mscale=1.0, yarn_mscale_all_dim=0.707), position)
    np.testing.assert_allclose(unequal, 1.3688879454 / 1.2608037774, rtol=1e-6)


def test_trap_Y3_yarn_follows_the_configuration_not_the_length(tiny_model):
    model = tiny_model(**V3_YARN)
    short, _ = rotation(model, jnp.arange(4)[None])
    long, _ = rotation(model, jnp.arange(5000)[None])
    plain, _ = rotation(tiny_model(rope_head_dim=64), jnp.arange(4)[None])
    np.testing.assert_array_equal(short, long[:, :4])
    assert np.abs(np.asarray(short - plain)).max() > 1e-4


def test_trap_Y4_the_ramp_follows_the_original_length_not_the_longest_allowed(tiny_model):
    model = tiny_model(**V3_YARN)
    np.testing.assert_array_equal(frequencies(model), frequencies(tiny_model(**V3_YARN, maximum_positions=4096)))
    other = frequencies(tiny_model(**V3_YARN, yarn_original_length=163840))
    assert np.abs(frequencies(model) / other - 1.0).max() > 0.5


@pytest.mark.parametrize("changes", [{}, {**V3_YARN, "yarn_mscale": 0.5}], ids=["plain", "yarn"])
def test_trap_Y6_pairs_are_interleaved(tiny_model, changes):
    model = tiny_model(**changes)
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((2, 3, 2, model.rope_head_dim))
    positions = np.array([[0, 1, 7], [4095, 4096, 9000]])
    found = rotate(jnp.asarray(vectors, jnp.float32), rotation(model, jnp.asarray(positions)))
    wanted = [
        [[reference.rotate(head, position, model) for head in token] for token, position in zip(*row, strict=True)]
        for row in zip(vectors, positions, strict=True)
    ]
    # The angle itself is a float32: at position 9000 it is known to 5e-4.
    np.testing.assert_allclose(found, np.array(wanted), atol=3e-3)
    np.testing.assert_allclose(found[0], np.array(wanted)[0], atol=2e-6)


def test_a_product_of_rotated_vectors_depends_on_their_distance_alone(tiny_model):
    model = tiny_model(**V3_YARN)
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 64))

    def product(query_position: int, key_position: int) -> float:
        turned_query = rotate(query, rotation(model, jnp.array([[query_position]])))
        turned_key = rotate(key, rotation(model, jnp.array([[key_position]])))
        return float(jnp.vdot(turned_query, turned_key))

    assert product(60, 3) == pytest.approx(product(157, 100), abs=1e-3)
    assert abs(product(60, 3) - product(3, 60)) > 0.1


def test_a_vector_without_head_dim_is_rotated_like_one_head(tiny_model):
    model = tiny_model()
    x_BSR = jax.random.normal(jax.random.key(0), (2, 5, model.rope_head_dim))
    by = rotation(model, jnp.arange(5)[None])
    turn = jax.jit(rotate)
    np.testing.assert_array_equal(turn(x_BSR, by), turn(x_BSR[:, :, None], by)[:, :, 0])


def test_angles_are_float32_whatever_the_type_of_what_is_rotated(tiny_model):
    model = tiny_model(precision="bfloat16")
    by = rotation(model, jnp.array([[5000]]))
    assert by[0].dtype == by[1].dtype == jnp.float32
    x = jax.random.normal(jax.random.key(0), (1, 1, model.rope_head_dim)).astype(jnp.bfloat16)
    turned = rotate(x, by)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, rotate(x.astype(jnp.float32), by).astype(jnp.bfloat16))
