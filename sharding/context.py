"""Rows divided over devices by position: which ones a device has, and all of them again where attention needs them.

A row is cut into twice as many chunks as there are devices; device c has chunk c and, from the end, chunk c again. A
late position attends to more than an early one: so every device has as much to do.
"""

import jax
import jax.numpy as jnp
from jax import Array

from sharding.collectives import axis_index, axis_size

CONTEXT_AXES = ("context",)


def context_part(x_BS: Array) -> Array:
    """This device's positions of whole rows [B, S, ..]: two chunks, one after the other."""
    devices = axis_size(CONTEXT_AXES)
    if devices == 1:
        return x_BS
    chunks = x_BS.reshape(x_BS.shape[0], 2 * devices, -1, *x_BS.shape[2:])
    mine = [jax.lax.dynamic_index_in_dim(chunks, chunk, 1, keepdims=False) for chunk in context_chunks()]
    return jnp.concatenate(mine, axis=1)


def context_whole(x_BS: Array) -> Array:
    """Whole rows, in order, of every device's positions."""
    if axis_size(CONTEXT_AXES) == 1:
        return x_BS
    parts = jax.lax.all_gather(x_BS, CONTEXT_AXES, axis=1)
    early, late = jnp.split(parts, 2, axis=2)
    chunks = jnp.concatenate([early, late[:, ::-1]], axis=1)
    return chunks.reshape(x_BS.shape[0], -1, *x_BS.shape[2:])


def context_chunks() -> tuple[Array | int, Array | int]:
    """Which two of the chunks this device has."""
    me, devices = axis_index(CONTEXT_AXES), axis_size(CONTEXT_AXES)
    return me, 2 * devices - 1 - me
