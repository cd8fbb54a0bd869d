"""What every layer is made of: declared parameters, norms, contractions, stacks of equal blocks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.kernels import attention
from dsv3_jax.kernels.float8_linear import SWIGLU_INPUT
from dsv3_jax.kernels.float8_matmul import float8_matmul
from dsv3_jax.model import float8_training
from dsv3_jax.model.float8 import Float8Blocks
from dsv3_jax.model_config import ModelConfig
from sharding.collectives import gathered, present
from sharding.mesh import platform
from sharding.rules import stored_dim

M = TypeVar("M", bound=nnx.Module)

Remat = Literal["none", "up_projections", "block"]
KEPT = (attention.OUTPUT, "latent", "attended", SWIGLU_INPUT, "mtp")
"""What the backward pass does not recompute with remat "up_projections", by the names given to `kept`."""


def kept(x: Array, name: str) -> Array:
    """x, one of those named in KEPT."""
    assert name in KEPT
    return checkpoint_name(x, name)


def recomputed(function: Callable, remat: Remat, *, prevent_cse: bool = True) -> Callable:
    """`function`, of which the backward pass recomputes what `remat` says."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT) if remat == "up_projections" else None
    return jax.checkpoint(function, prevent_cse=prevent_cse, policy=policy)


class RouterBias(nnx.Variable):
    """Selection bias of a router: float32 always, moved by counted load, never by a gradient or an optimizer."""


def parameter(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), naming its dims where it is made.

    The names are logical: a table says which mesh axis each goes to. They are kept as plain metadata, out of
    reach of flax's eager sharding, which would try to resolve them at creation.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} has {len(shape)} dims, axes {tuple(axes)} name {len(axes)}")
    value = std * jax.random.normal(rngs.params(), tuple(shape), jnp.float32)
    return nnx.Param(value, logical_axes=tuple(axes))


def contract(equation: str, left: Array, right: Array, dtype: jnp.dtype, output: jnp.dtype | None = None) -> Array:
    """Einsum of two operands cast to `dtype`; the result has type `output`, by default `dtype`.

    A float32 product is a full float32 product everywhere: the TPU default would round its operands to bfloat16.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(
        equation, left.astype(dtype), right.astype(dtype), precision=precision, preferred_element_type=output or dtype
    )


def whole(parameter: nnx.Variable, dtype: jnp.dtype) -> Array:
    """What a product takes of a parameter: gathered where a mesh stores it in pieces, in the type of the product.

    A dim divided by what devices compute, such as heads or experts, stays this device's part.
    """
    stored, value = stored_dim(parameter.get_metadata("logical_axes")), parameter.get_value()
    if isinstance(value, Float8Blocks):
        value = value.values(dtype)
    return gathered(value, stored.dim, stored.axes, dtype) if stored else value.astype(dtype)


def held(parameter: nnx.Variable, dtype: jnp.dtype) -> Array | Float8Blocks:
    """`whole`, but blocks in FP8 as they are where a kernel multiplies with them: on TPUs, where none are gathered."""
    value, stored = parameter.get_value(), stored_dim(parameter.get_metadata("logical_axes"))
    if isinstance(value, Float8Blocks) and platform() == "tpu" and not (stored and present(stored.axes)):
        return value
    return whole(parameter, dtype)


def multiplied(equation: str, x: Array, parameter: nnx.Variable, dtype: jnp.dtype) -> Array:
    """`contract` with a parameter, whose first dims are the last of x and are summed over, in any way it is held."""
    matrix = held(parameter, dtype)
    if not isinstance(matrix, Float8Blocks):
        return contract(equation, x, matrix, dtype)
    left, _, right = equation.partition("->")[0].partition(",")
    summed_over = sum(letter in left for letter in right)
    *single, block = matrix.blocks[-matrix.codes.ndim :][:summed_over]
    depths, columns = matrix.codes.shape[:summed_over], matrix.codes.shape[summed_over:]
    if any(size != 1 for size in single) or (single and depths[-1] % block):
        return contract(equation, x, matrix.values(dtype), dtype)
    # One group of one matrix: several dims that are summed over are one, cut into the same blocks.
    codes = matrix.codes.reshape(1, -1, *columns)
    scales = matrix.scales.reshape(1, -1, *matrix.scales.shape[summed_over:])
    rows_MD = x.astype(dtype).reshape(-1, codes.shape[1])
    blocks = Float8Blocks(codes, scales, (1, block, *matrix.blocks[-len(columns) :]))
    product = float8_matmul(rows_MD, blocks, jnp.array([len(rows_MD)], jnp.int32))
    return product.reshape(*x.shape[: x.ndim - summed_over], *columns)


class RMSNorm(nnx.Module):
    """x * gain / sqrt(mean(x^2) + epsilon), statistics in float32, result in the type of x (FACTS 1.2)."""

    def __init__(self, dim: int, epsilon: float):
        self.gain = nnx.Param(jnp.ones((dim,), jnp.float32), logical_axes=("gain",))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        return _normalized(x, self.gain[...], self.epsilon)


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x), gate and up side by side in one [D, 2, F] parameter.

    The result is a sum over this device's part of F: the caller adds those of the other devices (TENSOR_AXES).
    """

    def __init__(self, model: ModelConfig, hidden: int, rngs: nnx.Rngs):
        width, std = model.width, model.initializer_std
        self.gate_up = parameter(rngs, (width, 2, hidden), ("width", "gate_up", "ffn"), std)
        self.down = parameter(rngs, (hidden, width), ("ffn", "width"), std)
        self.dtype = jnp.dtype(model.dtype)
        self.recipe = float8_training.recipe_of(model)

    def __call__(self, x_BSD: Array) -> Array:
        if self.recipe:
            return float8_training.feed_forward(x_BSD, self.gate_up, self.down, self.recipe)
        gate_and_up = multiplied("bsd,dcf->bscf", x_BSD, self.gate_up, self.dtype)
        gate_and_up = kept(gate_and_up, SWIGLU_INPUT)
        return multiplied("bsf,fd->bsd", swiglu(gate_and_up), self.down, self.dtype)


# The backward pass recomputes what lies inside a `jax.checkpoint`: these few elementwise operations cost less than
# writing what they would save to memory and reading it back.


@jax.checkpoint
def swiglu(gate_and_up: Array) -> Array:
    """silu(gate) * up: [.., 2, F] to [.., F]."""
    gate, up = (half.squeeze(-2) for half in jnp.split(gate_and_up, 2, axis=-2))
    return jax.nn.silu(gate) * up


@functools.partial(jax.checkpoint, static_argnums=2)
def _normalized(x: Array, gain: Array, epsilon: float) -> Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * gain).astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """`count` equal modules as one module whose every variable has a leading "layers" dim, for `scan_stack`."""
    structure = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def make_one(key: Array) -> nnx.State:
        return nnx.state(make(nnx.Rngs(params=key)))

    state = jax.vmap(make_one)(jax.random.split(rngs.params(), count))
    return nnx.merge(structure, _map_variables(lambda axes: ("layers", *axes), state))


def unstack(stacked: M) -> nnx.List[M]:
    """The modules of a stack, each with arrays of its own: `scan_stack` takes them as it takes the stack.

    A compiled loop over a stack copies every layer's arrays out of it before it uses them. That is nothing beside
    whole rows of tokens, and most of the time of a single one.
    """
    structure, state = nnx.split(stacked)
    count = jax.tree.leaves(state)[0].shape[0]

    def layer(index: int) -> nnx.State:
        return jax.tree.map(lambda leaf: leaf[index], _map_variables(lambda axes: axes[1:], state))

    return nnx.List([nnx.merge(structure, layer(index)) for index in range(count)])


def scan_stack(
    stacked: nnx.Module | nnx.List,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any = None,
    remat: Remat = "none",
) -> tuple[Any, Any]:
    """Scan `body(block, carry, input) -> (carry, output)` over the layers of a stack: one compiled body for any depth.

    Returns the last carry and the outputs; these and the inputs have a leading "layers" dim. The backward
    pass recomputes what `remat` says. An unstacked stack is compiled layer by layer, its inputs and
    outputs are lists.
    """
    if isinstance(stacked, nnx.List):
        outputs = []
        for index, block in enumerate(stacked):
            carry, output = body(block, carry, None if inputs is None else inputs[index])
            outputs.append(output)
        return carry, outputs
    structure, state = nnx.split(stacked)

    def step(carry, layer):
        layer_state, layer_input = layer
        block = nnx.merge(structure, _map_variables(lambda axes: axes[1:], layer_state))
        return body(block, carry, layer_input)

    # Of a loop's body the compiler does not see that what it recomputes was there before.
    step = recomputed(step, remat, prevent_cse=False)
    return jax.lax.scan(step, carry, (state, inputs))


def _map_variables(change: Callable[[tuple], tuple], state: nnx.State) -> nnx.State:
    """The state with every variable's logical axes changed."""
    return jax.tree.map(
        lambda variable: variable.replace(logical_axes=change(variable.get_metadata("logical_axes"))),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
