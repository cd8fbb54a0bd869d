"""The table: every parameter of every model has its place, and what does not divide is refused by name."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs.v3_671b import config as v3_671b
from dsv3_jax.model.functional import abstract_trees, logical_axes, parameter_specs, skeleton_of
from sharding import rules
from sharding.mesh import AXES, LayoutError
from sharding.rules import COMPUTED, STORED, check_layout, partition_spec, stored_dim

SKELETON = skeleton_of(v3_671b.model)


def test_the_table_names_only_axes_of_the_mesh_and_every_name_once():
    assert {axis for axes in (*COMPUTED.values(), *STORED.values()) for axis in axes} <= set(AXES)
    assert not COMPUTED.keys() & STORED.keys()


def test_every_parameter_of_671b_has_a_place_on_a_mesh_of_all_axes(mesh_with):
    mesh = mesh_with(fsdp=2, expert=2, tensor=2)
    check_layout(abstract_trees(SKELETON)[0], logical_axes(SKELETON), mesh)
    specs, router_bias = parameter_specs(SKELETON, mesh)
    block = specs["moe_blocks"]
    assert block["feed_forward"]["experts"]["gate_up"] == PartitionSpec(None, ("expert",), ("fsdp",), None, ("tensor",))
    assert block["feed_forward"]["shared"]["down"] == PartitionSpec(None, ("tensor",), ("fsdp", "expert"))
    assert block["attention"]["query_up"] == PartitionSpec(None, ("fsdp", "expert"), ("tensor",), None)
    assert specs["embedding"] == PartitionSpec(("tensor",), ("fsdp", "expert"))
    # What every device needs whole and is small: gains, and the biases that every device moves alike.
    assert block["attention_norm"]["gain"] == PartitionSpec(None, None)
    assert set(jax.tree.leaves(router_bias, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))) == {
        PartitionSpec(None, None),
        PartitionSpec(None),
    }


def test_every_large_parameter_of_671b_is_in_as_many_pieces_as_there_are_devices(mesh_with):
    mesh = mesh_with(fsdp=2, expert=4)
    specs = jax.tree.leaves(parameter_specs(SKELETON, mesh)[0], is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    for leaf, spec in zip(jax.tree.leaves(abstract_trees(SKELETON)[0]), specs, strict=True):
        axes = [axis for dim in spec if dim for axis in ((dim,) if isinstance(dim, str) else dim)]
        pieces = np.prod([mesh.shape[axis] for axis in axes], dtype=int)
        assert pieces == 8 or leaf.size < 1e6


def test_a_dim_that_does_not_divide_is_refused_with_the_sizes_that_would(mesh_with):
    mesh = mesh_with(tensor=8)
    with pytest.raises(LayoutError) as caught:
        check_layout(
            {"block": {"output": np.zeros((12, 4, 8))}}, {"block": {"output": ("heads", "value_dim", "width")}}, mesh
        )
    assert str(caught.value) == (
        "parameter block.output: mesh.tensor=8 must divide its 'heads' of 12; their product may be 1, 2, 3, 4, 6, 12"
    )


def test_a_mesh_axis_for_two_dims_of_one_parameter_is_refused(mesh_with, monkeypatch):
    monkeypatch.setitem(rules.COMPUTED, "value_dim", ("tensor",))
    with pytest.raises(
        LayoutError, match="parameter output: mesh axis 'tensor' would divide both 'heads' and 'value_dim'"
    ):
        check_layout({"output": np.zeros((8, 8, 8))}, {"output": ("heads", "value_dim", "width")}, mesh_with(tensor=2))


def test_a_name_that_the_table_lacks_is_refused(mesh_with):
    with pytest.raises(LayoutError, match="'hedas' is not in the table"):
        partition_spec(("hedas", "width"), mesh_with(data=2))


def test_the_stored_dim_is_the_one_to_gather():
    assert stored_dim(("heads", "value_dim", "width")) == (2, ("fsdp", "node", "expert", "context"))
    assert stored_dim(("experts", "expert_width", "gate_up", "expert_ffn")) == (1, ("fsdp", "context"))
    assert stored_dim(("gain",)) is None
