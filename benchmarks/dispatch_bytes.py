"""Bytes that the dispatch of one MoE layer sends between nodes: a token once to each expert, or once to each node.

python -m benchmarks.dispatch_bytes

Compiles DeepSeek-V3's layer of experts, without running it, for meshes of virtual CPU devices, and reads its
collectives from the compiled program. Counted is what one device sends in one round:

    all-to-alls over node, or over node and expert together: of a buffer divided over the devices of n nodes, the share
    that leaves the node is (n - 1) / n; the rest stays inside

Rows are float32, as XLA:CPU exchanges bfloat16 as float32 too.

On the CPU a round moves buckets of fixed size. With a dispatch factor of 1 they hold what perfectly balanced routing
sends and no more, so their bytes are those of the rows, of the weights and expert numbers that go along, and of the
answers. Where buckets fill unevenly, the loops around these all-to-alls run again, in either way of sending; a ragged
all-to-all (TPU, GPU) sends the rows there are. How many those are is counted besides, from random routings.
Queue lengths, a few numbers a device, are not counted.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from configs.v3_671b import config as v3_671b
from dsv3_jax.model.moe import answered
from dsv3_jax.model.router import choose_experts
from dsv3_jax.plan.collectives import collectives
from dsv3_jax.plan.hlo import Program
from sharding.dispatch import Routes, nodes_per_token, through_experts
from sharding.mesh import AXES, make_mesh, on_mesh

NUMBER = 4
"""Bytes of a float32 and of an int32."""


class Layer(NamedTuple):
    """One dispatch: sizes of the layer and of what a device has of the batch."""

    tokens: int
    """Of one device."""
    width: int
    hidden: int
    choices: int
    """Experts a token."""


class Traffic(NamedTuple):
    """Bytes that one device sends in one round."""

    between: float
    """To other nodes."""
    inside: float
    """To other devices of its node."""


V3 = Layer(tokens=4096, width=7168, hidden=2048, choices=8)

# Nodes, devices in each, groups a token chooses from (V3: 4 of 8, trained with a node for every group).
CASES = ((2, 4, 4), (4, 2, 4), (8, 1, 4), (8, 1, 2), (8, 8, 4))


def expert_mesh(nodes: int, devices: int) -> Mesh:
    sizes = {**dict.fromkeys(AXES, 1), "node": nodes, "expert": devices}
    return make_mesh(sizes, jax.devices()[: nodes * devices])


def compiled_traffic(layer: Layer, routes: Routes, mesh: Mesh, gradient: bool) -> Traffic:
    """What the compiled layer sends, forward alone or with its gradient."""

    def forward(matrices, x_ND, weights_NK, experts_NK):
        return through_experts(answered, matrices, x_ND, weights_NK, experts_NK, routes)

    def with_gradient(matrices, x_ND, weights_NK, experts_NK):
        answers, transpose = jax.vjp(lambda *floats: forward(*floats, experts_NK), matrices, x_ND, weights_NK)
        return answers, transpose(answers)

    def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens, spec = layer.tokens * mesh.size, PartitionSpec(mesh.axis_names)
    matrices = (
        array(routes.experts, layer.width, 2, layer.hidden),
        array(routes.experts, layer.hidden, layer.width),
    )
    function = on_mesh(with_gradient if gradient else forward, mesh, spec, spec)
    lowered = jax.jit(function).lower(
        matrices,
        array(tokens, layer.width),
        array(tokens, layer.choices, dtype="float32"),
        array(tokens, layer.choices, dtype="int32"),
    )
    # Nothing runs: the machine code may be slow, as long as it is made fast.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    return sent(compiled.as_text(), mesh)


def sent(hlo: str, mesh: Mesh) -> Traffic:
    """What one device sends in the all-to-alls of a compiled program, each loop run once."""
    between = inside = 0.0
    for each in collectives(Program(hlo), mesh):
        if each.kind.endswith("all-to-all"):
            nodes = mesh.shape["node"] if "node" in each.axes else 1
            devices = int(np.prod([mesh.shape[axis] for axis in each.axes]))
            leaves = each.bytes_sent * devices / (devices - 1) * (nodes - 1) / nodes
            between, inside = between + leaves, inside + each.bytes_sent - leaves
    return Traffic(between, inside)


def bytes_between(layer: Layer, routes: Routes, mesh: Mesh, gradient: bool) -> float:
    """What one device has to send to other nodes, by arithmetic.

    A row goes with its weight, or with the weights and numbers of all the token's experts where the other node spreads
    it. Forward sends rows and gets answers; the gradient sends rows again, with that of their answers, and gets the
    gradients of rows and weights.
    """
    nodes, width = mesh.shape["node"], NUMBER * layer.width
    if routes.once_a_node:
        rows, receivers = nodes_per_token(routes, layer.choices, nodes), nodes
        weights, numbers = NUMBER * layer.choices, NUMBER * layer.choices
    else:
        rows, receivers, weights, numbers = layer.choices, mesh.size, NUMBER, 0
    factor = min(routes.factor, receivers)
    total = factor * (width + weights + numbers) + width
    if gradient:
        total += factor * (2 * width + weights + numbers) + width + weights
    return layer.tokens * rows * total * (nodes - 1) / nodes


def random_routing(tokens: int, groups_per_token: int) -> Array:
    """int32 [tokens, K]: the experts that V3's group-limited choice takes from random scores."""
    model = dataclasses.replace(v3_671b.model, groups_per_token=groups_per_token)
    return choose_experts(jax.random.uniform(jax.random.key(0), (tokens, model.experts)), model)


def rows_between(experts_NK: np.ndarray, experts: int, nodes: int) -> tuple[float, float, int]:
    """Rows a token sends to other nodes on average, once an expert and once a node, and the most nodes of one token.

    Tokens are divided over the nodes in order.
    """
    node_NK = experts_NK // (experts // nodes)
    home_N = np.arange(len(experts_NK)) * nodes // len(experts_NK)
    goes_NT = (node_NK[:, :, None] == np.arange(nodes)).any(axis=1)
    away_NT = goes_NT & (np.arange(nodes) != home_N[:, None])
    flat = (node_NK != home_N[:, None]).sum()
    return flat / len(home_N), away_NT.sum() / len(home_N), int(goes_NT.sum(axis=1).max())


def report(nodes: int, devices: int, groups_per_token: int) -> None:
    model, mesh = v3_671b.model, expert_mesh(nodes, devices)
    print(f"\n{nodes} nodes of {devices} device{'s' * (devices > 1)}, {groups_per_token} of 8 groups a token")
    for name, gradient in (("forward", False), ("and backward", True)):
        counted, wanted = [], []
        for once_a_node in (False, True):
            routes = Routes(model.experts, model.expert_groups, groups_per_token, 1.0, once_a_node)
            counted.append(compiled_traffic(V3, routes, mesh, gradient))
            wanted.append(bytes_between(V3, routes, mesh, gradient))
        flat, two = counted
        print(
            f"  {name:<12} MB between nodes {flat.between / 1e6:8.1f} ->{two.between / 1e6:8.1f}, "
            f"ratio {flat.between / two.between:.3f}, by arithmetic {wanted[0] / wanted[1]:.3f};  "
            f"MB inside {flat.inside / 1e6:7.1f} ->{two.inside / 1e6:8.1f}",
            flush=True,
        )
    flat_rows, two_rows, most = rows_between(np.asarray(random_routing(8192, groups_per_token)), model.experts, nodes)
    print(
        f"  random routing: rows a token sends to other nodes {flat_rows:.2f} -> {two_rows:.2f}, "
        f"ratio {flat_rows / two_rows:.2f}; no token went to more than {most} nodes"
    )


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(nodes * devices for nodes, devices, _ in CASES))
    print(f"{V3.tokens} tokens a device, {V3.width} wide, {V3.choices} experts each; once an expert -> once a node")
    for case in CASES:
        report(*case)


if __name__ == "__main__":
    main()
