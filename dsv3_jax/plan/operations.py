"""Floating-point operations of the matrix products of a traced program, on one device."""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval

ROUNDS = 1
"""Times that a loop of unknown length is taken to run: balanced routing needs one round of the dispatch."""
GROUPED = "grouped_matmul"
"""What the names of kernels over grouped rows begin with."""

Flops = dict[str, float]
"""By the type of a product's operands."""


def matrix_flops(jaxpr: core.Jaxpr, filled: float = 1.0) -> Flops:
    """FLOPs of all matrix products, 2 a multiply-add.

    Bodies of scans count as often as they run, of branches the costliest, kernels by their own estimate. A kernel or
    product over rows grouped by expert is given buffers for more rows than there are: `filled` is the share of them
    that it multiplies. What no result depends on is not counted: compilers leave it out.
    """
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _flops(used, filled)


def _flops(jaxpr: core.Jaxpr, filled: float) -> Flops:
    total: Flops = defaultdict(float)
    for equation in jaxpr.eqns:
        for dtype, flops in _of_equation(equation, filled):
            total[dtype] += flops
    return dict(total)


def _of_equation(equation: Any, filled: float) -> Iterator[tuple[str, float]]:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        yield _dtype(equation), _dot_flops(equation)
    elif name.startswith("ragged_dot"):
        yield _dtype(equation), filled * _ragged_flops(equation)
    elif name == "pallas_call":
        share = filled if str(parameters["name"]).startswith(GROUPED) else 1.0
        yield _dtype(equation), share * parameters["cost_estimate"].flops
    elif name == "cond":
        branches = [_flops(branch.jaxpr, filled) for branch in parameters["branches"]]
        yield from max(branches, key=lambda branch: sum(branch.values())).items()
    elif name == "scan":
        yield from _times(_flops(parameters["jaxpr"].jaxpr, filled), parameters["length"])
    elif name == "while":
        yield from _times(_flops(parameters["body_jaxpr"].jaxpr, filled), ROUNDS)
    else:
        for inner in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if inner in parameters:
                yield from _flops(getattr(parameters[inner], "jaxpr", parameters[inner]), filled).items()
                break


def _times(flops: Flops, count: int) -> Iterator[tuple[str, float]]:
    return ((dtype, count * number) for dtype, number in flops.items())


def _dtype(equation: Any) -> str:
    """Of the first operand with a floating-point type; a kernel's first ones may be integers."""
    types = [operand.aval.dtype for operand in equation.invars]
    return next(str(dtype) for dtype in types if dtype.kind in "fV")


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[dim] for dim in contracted)
    return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)


def _ragged_flops(equation: Any) -> float:
    """Of rows with their group's matrix, or of one group's rows with each other: every row meets one matrix."""
    rows, depth = equation.invars[0].aval.shape
    return 2.0 * rows * depth * equation.outvars[0].aval.shape[-1]
