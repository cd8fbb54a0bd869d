"""The latent cache as rows and as pages: what was written is read, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.cache import NOWHERE, Latents, PagedLatents, empty, read, read_block, write

ROWS, PAGES, SIZE, WIDTH = 2, 6, 4, 3
TABLE = jnp.array([[4, 1], [0, 5]])


def cache_of(kind: str, dtype: str) -> Latents:
    if kind == "rows":
        return empty(ROWS, 2 * SIZE, WIDTH, dtype=dtype)
    return PagedLatents(empty(PAGES, SIZE, WIDTH, dtype=dtype), TABLE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["rows", "pages"])
def test_what_is_written_is_read_bit_for_bit(kind, dtype):
    latent_BSX = np.random.default_rng(0).normal(size=(ROWS, 3, WIDTH)).astype(np.float32)
    # A zero's sign, subnormals, the largest, infinity: numbers that a detour over another type might lose.
    latent_BSX[0, 0] = -0.0, 1e-40, -3.3e38
    latent_BSX[1, 2, 0] = np.inf
    positions_BS = jnp.array([[0, 1, 2], [3, 4, NOWHERE]])
    cache = write(cache_of(kind, dtype), jnp.asarray(latent_BSX), positions_BS)
    expected_BTX = np.zeros((ROWS, 2 * SIZE, WIDTH), dtype)
    expected_BTX[0, :3], expected_BTX[1, 3:5] = latent_BSX[0], latent_BSX[1, :2]
    read_BTX = np.asarray(read(cache, positions_BS))
    assert read_BTX.dtype == dtype and read_BTX.tobytes() == expected_BTX.tobytes()
    block = np.asarray(read_block(cache, jnp.int32(1), jnp.int32(SIZE), SIZE))
    assert block.dtype == dtype and block.tobytes() == expected_BTX[1, SIZE:].tobytes()


@pytest.mark.parametrize("kind", ["rows", "pages"])
def test_one_entry_does_not_touch_the_others(kind):
    """XLA:CPU converts a whole array of bfloat16 to float32 and back to scatter into it: 11 times the time of `tiny`'s
    pass over 16 slots."""

    def written(cache: Latents) -> Latents:
        return write(cache, jnp.ones((ROWS, 1, WIDTH)), jnp.zeros((ROWS, 1), jnp.int32))

    cache = cache_of(kind, "bfloat16")
    whole = ",".join(map(str, jax.tree.leaves(cache)[0].shape))
    compiled = jax.jit(written, donate_argnums=0).lower(cache).compile().as_text()
    assert f"[{whole}]" in compiled and f"f32[{whole}]" not in compiled and "convert(" not in compiled


def test_other_devices_than_a_cpu_hold_the_compute_type():
    """Also where a program is compiled on a CPU for devices that are not here."""
    devices = jax.sharding.AbstractDevice("TPU v5", 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((8,), ("data",), abstract_device=devices)):
        assert jax.eval_shape(lambda: empty(ROWS, SIZE, WIDTH, dtype="bfloat16")).dtype == jnp.bfloat16
    assert empty(ROWS, SIZE, WIDTH, dtype="bfloat16").dtype == jnp.uint16
