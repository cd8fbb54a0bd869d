"""Parts of a parameter that is to be held in FP8 (model/float8.py): codes as stored, scales by its own dims."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.fp8_blocks import BLOCK, decoded_scales
from dsv3_jax.convert.inventory import FP8
from dsv3_jax.convert.sources import TensorSource
from dsv3_jax.convert.tensors import Leaf

Bounds = tuple[tuple[int, int], ...]
"""Start and stop in every dim."""


def refuse_other_types(source: TensorSource, leaf: Leaf) -> None:
    """Raises ConversionError where a tensor of the parameter is not in FP8."""
    for tensor, index in leaf.tensors():
        if (found := source.type_of(leaf, index)) != FP8:
            raise ConversionError(
                f"{tensor} is {found}, and weights=float8 holds what is in FP8 already: "
                "python -m dsv3_jax.convert export DIR OUT --dtype=fp8 makes such a directory of any model"
            )


def codes_of(source: TensorSource, leaf: Leaf, bounds: Bounds, pool: ThreadPoolExecutor) -> np.ndarray:
    """float8_e4m3fn, the part of the parameter between these bounds."""
    part = np.empty([stop - start for start, stop in bounds], ml_dtypes.float8_e4m3fn)
    as_tensors = part.transpose(leaf.order)
    of_matrix = tuple(slice(*bounds[dim]) for dim in leaf.row_dims + leaf.column_dims)

    def fill(place_and_index: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        place, index = place_and_index
        as_tensors[place] = source.read(leaf, index, of_matrix)

    list(pool.map(fill, _tensors_within(leaf, bounds)))
    return part


def scales_of(
    source: TensorSource, leaf: Leaf, bounds: Bounds, blocks: tuple[int, ...], pool: ThreadPoolExecutor
) -> np.ndarray:
    """float32, a scale for each of `blocks` of the parameter between these bounds, which count in blocks."""
    part = np.empty([stop - start for start, stop in bounds], np.float32)
    as_tensors = part.transpose(leaf.order)
    rows, columns = (_stored_blocks(leaf, dims, bounds, blocks) for dims in (leaf.row_dims, leaf.column_dims))
    shape = as_tensors.shape[len(leaf.index_dims) :]

    def fill(place_and_index: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        place, index = place_and_index
        grid = decoded_scales(source.scales(leaf, index), source.form.scale_type)
        as_tensors[place] = grid[np.ix_(rows, columns)].reshape(shape)

    list(pool.map(fill, _tensors_within(leaf, bounds)))
    return part


def _stored_blocks(leaf: Leaf, dims: tuple[int, ...], bounds: Bounds, blocks: tuple[int, ...]) -> np.ndarray:
    """Of scales along dims that make up a tensor's rows or columns, which of the tensor's blocks each belongs to."""
    first = np.zeros(1, int)
    for dim in dims:
        first = (first[:, None] * leaf.shape[dim] + np.arange(*bounds[dim]) * blocks[dim]).reshape(-1)
    return first // BLOCK


def _tensors_within(leaf: Leaf, bounds: Bounds) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of each tensor that the bounds have a part of, its place in the part and its index in the whole."""
    ranges = [range(*bounds[dim]) for dim in leaf.index_dims]
    inside = itertools.product(*(range(len(one)) for one in ranges))
    return zip(inside, itertools.product(*ranges), strict=True)
