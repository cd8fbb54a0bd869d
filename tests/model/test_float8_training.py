"""One mixture of experts trained in FP8: against numpy on one device, and on eight devices against one."""

import collections
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.kernels.quantization import Recipe
from dsv3_jax.model import float8_training
from dsv3_jax.model.moe import MixtureOfExperts
from dsv3_jax.model_config import ModelConfig
from sharding.collectives import spread, summed, variation
from sharding.mesh import TOKEN_AXES, on_mesh, one_device, row_spec
from sharding.rules import TENSOR_AXES, partition_specs
from tests.conftest import TINY
from tests.reference import float8 as reference
from tests.reference import routing
from tests.reference.weights import random_module

# A width that is cut into eighths within blocks, and has a short last tile; hidden widths with whole blocks a device.
ROWS, LENGTH = 8, 128
CHANGES = {"width": 264, "expert_ffn_width": 256, "initializer_std": 0.05, "dispatch_factor": 1.0, "precision": "fp8"}


def _inputs(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x, cotangent = (random.standard_normal((ROWS, LENGTH, model.width)).astype(np.float32) for _ in range(2))
    return x * 10.0 ** random.uniform(-1, 1, (ROWS, LENGTH, 1)).astype(np.float32), cotangent


@functools.cache
def _trained(mesh: Any) -> tuple[Any, Any]:
    """The block's output, and gradients of its parameters and its input, in float32 all but the products."""
    model = dataclasses.replace(TINY, **CHANGES)
    structure, parameters, rest = nnx.split(random_module(MixtureOfExperts, model)[0], nnx.Param, ...)

    def specs(state: Any) -> Any:
        return jax.tree.map(
            lambda variable: variable.replace(partition_specs(variable.get_metadata("logical_axes"), mesh)),
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )

    def of_device(parameters, rest, x_BSD, cotangent_BSD):
        def out(own, x_BSD):
            return summed(nnx.merge(structure, own, rest)(x_BSD)[0], TENSOR_AXES)

        own = jax.tree.map(lambda leaf: spread(leaf, TOKEN_AXES), parameters)
        out_BSD, transpose = jax.vjp(out, own, x_BSD)
        of_own, of_x_BSD = transpose(cotangent_BSD)

        def whole(gradient, parameter):
            return summed(gradient, [axis for axis in variation(gradient) if axis not in variation(parameter)])

        return out_BSD, jax.tree.map(whole, of_own, parameters), of_x_BSD

    rows = row_spec(mesh)
    in_specs = specs(parameters), specs(rest), rows, rows
    step = jax.jit(on_mesh(of_device, mesh, in_specs, (rows, in_specs[0], rows)))
    out, of_parameters, of_x = jax.device_get(step(parameters, rest, *_inputs(model)))
    return out, {**nnx.to_pure_dict(of_parameters), "x": of_x}


def test_gradients_of_a_large_batch_travel_as_exactly_as_those_of_a_small_one():
    gradient_MD, factor = _inputs(TINY)[1].reshape(-1, TINY.width), np.float32(2.0**-50)
    encode, decode = float8_training.wire(TINY.width, jnp.dtype("bfloat16"), Recipe())
    found, wanted = (np.asarray(decode(encode(rows)), np.float32) for rows in (gradient_MD * factor, gradient_MD))
    np.testing.assert_array_equal(found, wanted * factor)
    assert wanted.any()


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_output_and_gradients_are_those_of_numpy(tiny_model):
    model = tiny_model(**CHANGES)
    _, weights = random_module(MixtureOfExperts, model)
    x_ND, cotangent_ND = (each.reshape(-1, model.width) for each in _inputs(model))
    gates = [
        routing.route(x.astype(np.float64), weights["router"]["weight"], weights["router"]["bias"], model) for x in x_ND
    ]
    out_ND = _network(x_ND, None, weights["shared"]["gate_up"], weights["shared"]["down"], cotangent_ND)[0]
    experts, of_experts = weights["experts"], {"gate_up": [], "down": []}
    for expert in range(model.experts):
        mine = [token for token, gate in enumerate(gates) if expert in gate.experts]
        weight = np.array([gates[token].weights[gates[token].experts.index(expert)] for token in mine])
        matrices = experts["gate_up"][expert], experts["down"][expert]
        out, of_gate_up, of_down = _network(x_ND[mine], weight, *matrices, cotangent_ND[mine])
        out_ND[mine] += out
        of_experts["gate_up"].append(of_gate_up)
        of_experts["down"].append(of_down)
    out, gradients = _trained(one_device())
    # What is left are numbers on the border of two codes, which float32 and float64 put to different sides.
    assert _relative(out.reshape(-1, model.width), out_ND) < 1e-4
    for name, wanted in of_experts.items():
        assert _relative(gradients["experts"][name], np.stack(wanted)) < 1e-3


def _network(x, weight, gate_up_DcF, down_FD, cotangent):
    """One network's answers, and gradients of its two matrices. `weight`: of routed tokens, dispatched in FP8."""
    routed = weight is not None
    scale, tokens = weight[:, None] if routed else 1.0, [len(x)]
    rows = reference.as_rows(x, power_of_two=routed)
    gate_up, down = [reference.as_blocks(gate_up_DcF[:, half]) for half in (0, 1)], reference.as_blocks(down_FD)
    gate, up = (rows @ matrix for matrix in gate_up)
    answer = reference.as_rows((_silu(gate) * up * scale).astype(np.float32)) @ down
    came = reference.as_rows(cotangent, power_of_two=routed)
    gate, up = (reference.as_rows(half.astype(np.float32)) for half in (gate, up))
    again = reference.as_columns((_silu(gate) * up * scale).astype(np.float32), tokens)
    of_down = again.T @ reference.as_columns((came if routed else cotangent).astype(np.float32), tokens)
    of_hidden, sigmoid = came @ down.T * scale, 1 / (1 + np.exp(-gate))
    halves = of_hidden * up * sigmoid * (1 + gate * (1 - sigmoid)), of_hidden * _silu(gate)
    left = reference.as_columns(rows.astype(np.float32), tokens)
    of_gate_up = [left.T @ reference.as_columns(half.astype(np.float32), tokens) for half in halves]
    return answer, np.stack(of_gate_up, axis=1), of_down


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("sizes", "same_tiles"),
    [({"expert": 8}, True), ({"node": 2, "expert": 4}, False), ({"fsdp": 4, "tensor": 2}, False)],
    ids=["expert", "node", "fsdp and tensor"],
)
def test_eight_devices_are_one(sizes, same_tiles, mesh_with):
    """Divided over one axis, an expert's rows come in the order of all tokens: tiles of tokens are those of one device.
    Over nodes they come in another order, and where several devices have an expert each has tiles of its own tokens."""
    (wanted, of_one), (found, of_eight) = _trained(one_device()), _trained(mesh_with(data=1, **sizes))
    assert _relative(found, wanted) < 1e-4
    for path, gradient in jax.tree_util.tree_leaves_with_path(of_one):
        name = jax.tree_util.keystr(path)
        other = functools.reduce(lambda tree, key: tree[key.key], path, of_eight)
        assert _relative(other, gradient) < (1e-3 if same_tiles or "experts" not in name else 0.05), name


def test_rows_and_their_gradients_go_to_experts_as_bytes_and_come_back_in_bfloat16(mesh_with):
    """Forward one way and back; backward the rows once more, the gradient one way, that of the rows back."""
    model = dataclasses.replace(TINY, **CHANGES | {"width": 256})
    mesh, tokens = mesh_with(data=1, expert=2), 64
    structure, state = nnx.split(nnx.eval_shape(lambda: MixtureOfExperts(model, nnx.Rngs(0))))

    def of_device(state, x_BSD):
        out_BSD, transpose = jax.vjp(lambda x_BSD: nnx.merge(structure, state)(x_BSD)[0], x_BSD)
        return out_BSD, transpose(out_BSD)[0]

    def spec(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(partition_specs(variable.get_metadata("logical_axes"), mesh))

    specs = jax.tree.map(spec, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    step = jax.jit(on_mesh(of_device, mesh, (specs, row_spec(mesh)), row_spec(mesh)))
    x_BSD = jax.ShapeDtypeStruct((2, tokens, model.width), jnp.bfloat16)
    text = step.lower(state, x_BSD).as_text()
    sent = re.findall(r'"stablehlo.all_to_all".*-> tensor<(\w+)>', text)
    bucket = model.experts_per_token * tokens // 2
    # Of a row 256 codes, and a byte for each of its two scales, filled up to 128; or 256 numbers of two bytes. Each
    # row's weight goes along, and its gradient comes back.
    assert collections.Counter(sent) == {f"2x{bucket}x3x128xui8": 3, f"2x{bucket}x2x128xbf16": 2, f"2x{bucket}xf32": 3}
