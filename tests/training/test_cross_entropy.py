"""Chunked cross entropy against log softmax in float64, its gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.training.cross_entropy import TOKENS_AT_ONCE, cross_entropy

WIDTH, VOCABULARY = 8, 37


def _inputs(tokens: int, seed: int = 0, size: float = 1.0):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(tokens, WIDTH)).astype(np.float32)
    head = (size * random.normal(size=(WIDTH, VOCABULARY))).astype(np.float32)
    labels = random.integers(0, VOCABULARY, tokens).astype(np.int32)
    return hidden, head, labels, random.random(tokens) < 0.7


def _oracle(hidden, head, labels, counted):
    """Loss and gradients in float64."""
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    logits = hidden @ head
    logits -= logits.max(axis=1, keepdims=True)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    logit_gradient = (np.exp(log_softmax) - np.eye(head.shape[1])[labels]) * counted[:, None]
    loss = -log_softmax[np.arange(len(labels)), labels][counted].sum()
    return loss, logit_gradient @ head.T, hidden.T @ logit_gradient


def _both(hidden, head, labels, counted):
    return jax.jit(jax.value_and_grad(cross_entropy, argnums=(0, 1)))(hidden, head, labels, counted)


@pytest.mark.parametrize("tokens", [1, 2, 100, TOKENS_AT_ONCE - 1, TOKENS_AT_ONCE, TOKENS_AT_ONCE + 1, 2500])
def test_loss_and_gradients_whatever_the_number_of_tokens(tokens):
    inputs = _inputs(tokens)
    loss, (hidden_gradient, head_gradient) = _both(*inputs)
    expected = _oracle(*inputs)
    assert loss.dtype == jnp.float32 and hidden_gradient.shape == (tokens, WIDTH)
    np.testing.assert_allclose(loss, expected[0], rtol=2e-6)
    np.testing.assert_allclose(hidden_gradient, expected[1], atol=2e-6)
    np.testing.assert_allclose(head_gradient, expected[2], atol=2e-6 * tokens**0.5)
    np.testing.assert_allclose(jax.jit(cross_entropy)(*inputs), loss, rtol=1e-6)


def test_uncounted_tokens_touch_nothing():
    hidden, head, labels, counted = _inputs(TOKENS_AT_ONCE + 7)
    loss, gradients = _both(hidden, head, labels, counted)
    hidden[~counted], labels[~counted] = 1e3, 0
    other_loss, other_gradients = _both(hidden, head, labels, counted)
    assert float(loss) == float(other_loss)
    np.testing.assert_array_equal(gradients[1], other_gradients[1])
    np.testing.assert_array_equal(np.asarray(gradients[0])[~counted], 0)


def test_nothing_counted_is_zero_loss_and_zero_gradients():
    hidden, head, labels, counted = _inputs(5)
    loss, gradients = _both(hidden, head, labels, np.zeros_like(counted))
    assert float(loss) == 0 and not any(np.any(gradient) for gradient in gradients)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden, head, labels, counted = _inputs(64, size=1e4)
    loss, gradients = _both(hidden, head, labels, counted)
    expected = _oracle(hidden, head, labels, counted)
    assert expected[0] > 1e5
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_the_cotangent_scales_the_gradients():
    inputs = _inputs(50)
    _, gradients = _both(*inputs)
    scaled = jax.jit(jax.grad(lambda hidden, head: -3 * cross_entropy(hidden, head, *inputs[2:]), (0, 1)))(*inputs[:2])
    for gradient, times in zip(gradients, scaled, strict=True):
        np.testing.assert_allclose(times, -3 * gradient, rtol=1e-6)


def test_bfloat16_hidden_states_keep_float32_sums():
    hidden, head, labels, counted = _inputs(3000)
    narrow = jnp.asarray(hidden, jnp.bfloat16)
    loss, (hidden_gradient, head_gradient) = _both(narrow, head, labels, counted)
    rounded_head = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    expected = _oracle(np.asarray(narrow, np.float32), rounded_head, labels, counted)
    assert (hidden_gradient.dtype, head_gradient.dtype, loss.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(hidden_gradient, np.float32), expected[1], atol=0.05)
    np.testing.assert_allclose(head_gradient, expected[2], atol=0.02 * np.abs(expected[2]).max())
