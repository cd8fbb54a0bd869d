"""Tensors into a model's arrays, each device's part of them alone."""

import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dsv3_jax.convert.float8_parts import Bounds, codes_of, refuse_other_types, scales_of
from dsv3_jax.convert.sources import TensorSource, values
from dsv3_jax.convert.tensors import Leaf
from dsv3_jax.model.float8 import Float8Blocks

Tree = dict[str, Any]


def read_parameters(source: TensorSource, abstract: Tree) -> Tree:
    """Arrays for the tree {"parameters": ..., "router_bias": ...} of ShapeDtypeStructs, or one of the two.

    Each in the type of its leaf and placed by its sharding, on the first device where it has none. What this process's
    devices do not hold is not read.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = {leaf.path: leaf for leaf in source.leaves}

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:

        def array(path: tuple[Any, ...], wanted: Any) -> Any:
            leaf = leaves[tuple(key.key for key in path)]
            if isinstance(wanted, Float8Blocks):
                return in_float8(leaf, wanted)
            assert tuple(wanted.shape) == leaf.shape, f"{leaf.name}: {wanted.shape} wanted of {leaf.shape}"
            return placed(wanted, lambda bounds: _parts_of(source, leaf, bounds, wanted.dtype, pool))

        def in_float8(leaf: Leaf, wanted: Float8Blocks) -> Float8Blocks:
            refuse_other_types(source, leaf)

            def codes(bounds: set[Bounds]) -> dict[Bounds, np.ndarray]:
                return {one: codes_of(source, leaf, one, pool) for one in bounds}

            def scales(bounds: set[Bounds]) -> dict[Bounds, np.ndarray]:
                return {one: scales_of(source, leaf, one, wanted.blocks, pool) for one in bounds}

            return Float8Blocks(placed(wanted.codes, codes), placed(wanted.scales, scales), wanted.blocks)

        def placed(wanted: Any, parts_of: Callable[[set[Bounds]], dict[Bounds, np.ndarray]]) -> jax.Array:
            sharding = getattr(wanted, "sharding", None) or here
            indices = sharding.addressable_devices_indices_map(wanted.shape)
            bounds = {device: _bounds(wanted.shape, index) for device, index in indices.items()}
            parts = parts_of(set(bounds.values()))
            on_devices = [jax.device_put(parts[part], device) for device, part in bounds.items()]
            return jax.make_array_from_single_device_arrays(wanted.shape, sharding, on_devices)

        return jax.tree_util.tree_map_with_path(array, abstract, is_leaf=lambda one: isinstance(one, Float8Blocks))


def _bounds(shape: tuple[int, ...], index: tuple[slice, ...] | None) -> Bounds:
    index = index or ()
    dims = [*index, *[slice(None)] * (len(shape) - len(index))]
    return tuple(one.indices(size)[:2] for one, size in zip(dims, shape, strict=True))


def _parts_of(
    source: TensorSource, leaf: Leaf, wanted: set[Bounds], dtype: Any, pool: ThreadPoolExecutor
) -> dict[Bounds, np.ndarray]:
    """Parts of a parameter, each read once, whichever devices hold it."""
    around = tuple(
        (min(first), max(last)) for first, last in (zip(*dim, strict=True) for dim in zip(*wanted, strict=True))
    )
    if sum(map(_volume, wanted)) < _volume(around):
        return {bounds: _part_of(source, leaf, bounds, dtype, pool) for bounds in wanted}
    # They fill the space between them: one reading has longer pieces of rows.
    whole = _part_of(source, leaf, around, dtype, pool)

    def inside(bounds: Bounds) -> tuple[slice, ...]:
        dims = zip(bounds, around, strict=True)
        return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in dims)

    return {bounds: whole[inside(bounds)] for bounds in wanted}


def _volume(bounds: Bounds) -> int:
    return math.prod(stop - start for start, stop in bounds)


def _part_of(source: TensorSource, leaf: Leaf, bounds: Bounds, dtype: Any, pool: ThreadPoolExecutor) -> np.ndarray:
    """The part of a parameter between these bounds, put together from the tensors it lies in."""
    part = np.empty([stop - start for start, stop in bounds], np.dtype(dtype))
    as_tensors = part.transpose(leaf.order)
    of_matrix = tuple(slice(*bounds[dim]) for dim in leaf.row_dims + leaf.column_dims)
    firsts = [bounds[dim][0] for dim in leaf.index_dims]

    def fill(index: tuple[int, ...]) -> None:
        inside = tuple(one - first for one, first in zip(index, firsts, strict=True))
        as_tensors[inside] = values(source, leaf, index, of_matrix)

    list(pool.map(fill, itertools.product(*(range(*bounds[dim]) for dim in leaf.index_dims))))
    return part
