"""Numbers that are read and sent in another form than their gradient has.

Codes have no gradient in JAX: their type is too narrow for one, or no type of numbers at all. So the numbers that they
stand for go along, for the gradient to flow through. Nothing reads those, and what computes them is left out.
"""

from typing import Any, NamedTuple

import jax


class Encoded(NamedTuple):
    encoded: Any
    """Array or tree of arrays, without a gradient: what products read and what travels."""
    values: Any
    """Array, for its gradient alone."""


def values_of(tree: Any) -> Any:
    """What there are gradients of: of everything `Encoded` in the tree its values, anything else as it is."""
    return jax.tree.map(lambda leaf: leaf.values if isinstance(leaf, Encoded) else leaf, tree, is_leaf=_is_encoded)


def without_values(tree: Any) -> Any:
    """The rest; `with_values` puts both together again."""
    return jax.tree.map(
        lambda leaf: leaf._replace(values=None) if isinstance(leaf, Encoded) else None, tree, is_leaf=_is_encoded
    )


def with_values(rest: Any, values: Any) -> Any:
    return jax.tree.map(
        lambda leaf, value: value if leaf is None else leaf._replace(values=value),
        rest,
        values,
        is_leaf=lambda leaf: leaf is None or _is_encoded(leaf),
    )


def _is_encoded(leaf: Any) -> bool:
    return isinstance(leaf, Encoded)
