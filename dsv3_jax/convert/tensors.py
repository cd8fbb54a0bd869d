"""THE table: which tensor of a Hugging Face checkpoint is which part of which parameter (FACTS 2.2).

Each rule writes our dims and theirs in the letters of model/transformer.py, plus e (one head's dims), c (gate and up),
U (embedding and hidden, one after the other) and L (layers, where blocks are stacked). Theirs are a matrix
[rows, columns] = [out, in], as torch keeps it; a dim of ours that is in neither numbers the tensors:

    "EDcF"  <->  "experts.{E}.{c}_proj.weight"  "F,D"      gate_up[E, :, c, :] is that expert's matrix, transposed

Nothing is reordered within a dim: our rotary pairs are interleaved as the released weights' are.
"""

import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import jax

from dsv3_jax.model.functional import abstract_trees, skeleton_of
from dsv3_jax.model_config import ModelConfig

GATE_AND_UP = ("gate", "up")

Part = tuple[slice, ...]
"""Slices with start and stop, one a dim."""


class Rule(NamedTuple):
    dims: str
    name: str
    matrix: str
    quantized: bool = False
    """Whether an FP8 checkpoint has it in FP8."""


TOP = {
    "embedding": Rule("WD", "model.embed_tokens.weight", "W,D"),
    "norm.gain": Rule("D", "model.norm.weight", "D"),
    "head": Rule("DW", "lm_head.weight", "W,D"),
}
BLOCK = {
    "attention_norm.gain": Rule("D", "input_layernorm.weight", "D"),
    "attention.query": Rule("DHe", "self_attn.q_proj.weight", "He,D", True),
    "attention.query_down": Rule("DQ", "self_attn.q_a_proj.weight", "Q,D", True),
    "attention.query_norm.gain": Rule("Q", "self_attn.q_a_layernorm.weight", "Q"),
    "attention.query_up": Rule("QHe", "self_attn.q_b_proj.weight", "He,Q", True),
    "attention.key_value_down": Rule("DX", "self_attn.kv_a_proj_with_mqa.weight", "X,D", True),
    "attention.key_value_norm.gain": Rule("C", "self_attn.kv_a_layernorm.weight", "C"),
    "attention.key_value_up": Rule("CHe", "self_attn.kv_b_proj.weight", "He,C", True),
    "attention.output": Rule("HVD", "self_attn.o_proj.weight", "D,HV", True),
    "feed_forward_norm.gain": Rule("D", "post_attention_layernorm.weight", "D"),
    "feed_forward.gate_up": Rule("DcF", "mlp.{c}_proj.weight", "F,D", True),
    "feed_forward.down": Rule("FD", "mlp.down_proj.weight", "D,F", True),
    "feed_forward.router.weight": Rule("DE", "mlp.gate.weight", "E,D"),
    "feed_forward.router.bias": Rule("E", "mlp.gate.e_score_correction_bias", "E"),
    "feed_forward.experts.gate_up": Rule("EDcF", "mlp.experts.{E}.{c}_proj.weight", "F,D", True),
    "feed_forward.experts.down": Rule("EFD", "mlp.experts.{E}.down_proj.weight", "D,F", True),
    "feed_forward.shared.gate_up": Rule("DcF", "mlp.shared_experts.{c}_proj.weight", "F,D", True),
    "feed_forward.shared.down": Rule("FD", "mlp.shared_experts.down_proj.weight", "D,F", True),
}
MTP = {
    "embedding_norm.gain": Rule("D", "enorm.weight", "D"),
    "hidden_norm.gain": Rule("D", "hnorm.weight", "D"),
    "projection": Rule("UD", "eh_proj.weight", "D,U"),
    "norm.gain": Rule("D", "shared_head.norm.weight", "D"),
}
# The released files repeat both in every MTP layer; the model has each once.
MTP_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


class Leaf:
    """One parameter (or router bias) and the tensors it is made of."""

    def __init__(self, path: tuple[str | int, ...], shape: tuple[int, ...], rule: Rule, prefix: str, first_layer: int):
        self.path = path
        """Keys in the tree of a checkpoint's state; the first is "parameters" or "router_bias"."""
        self.shape = shape
        self.quantized = rule.quantized
        self._dims, self._name, self._first_layer = rule.dims, prefix + rule.name, first_layer
        rows, _, columns = rule.matrix.partition(",")
        self.row_dims = tuple(map(rule.dims.index, rows))
        """Dims of ours that make up a tensor's rows, the slowest first."""
        self.column_dims = tuple(map(rule.dims.index, columns))
        """The same for its columns; none for a vector."""
        matrix_dims = self.row_dims + self.column_dims
        self.index_dims = tuple(dim for dim in range(len(shape)) if dim not in matrix_dims)
        """Dims that number the tensors: layers, experts, gate and up."""
        self.order = self.index_dims + matrix_dims
        """All dims in the order of the tensors' bytes: one after the other they are this parameter, transposed."""

    @property
    def name(self) -> str:
        """Dotted path, the name of the array in a checkpoint."""
        return ".".join(map(str, self.path))

    @property
    def is_router_bias(self) -> bool:
        return self.path[0] == "router_bias"

    @cached_property
    def index_sizes(self) -> tuple[int, ...]:
        return tuple(self.shape[dim] for dim in self.index_dims)

    @cached_property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of each of its tensors: [rows, columns], or [rows]."""
        rows = math.prod(self.shape[dim] for dim in self.row_dims)
        columns = math.prod(self.shape[dim] for dim in self.column_dims)
        return (rows, columns) if self.column_dims else (rows,)

    @cached_property
    def matrix_dims(self) -> tuple[int, ...]:
        """Sizes of the dims that make up its tensors: those of the rows, then those of the columns."""
        return tuple(self.shape[dim] for dim in self.row_dims + self.column_dims)

    def flat(self, part: Part) -> tuple[slice, slice]:
        """Rows and columns of a tensor that a part of `matrix_dims` covers.

        Of dims that make up rows together all but the slowest must be whole: heads are divided, a head is not.
        """
        rows = len(self.row_dims)
        return _flat(part[:rows], self.matrix_dims[:rows]), _flat(part[rows:], self.matrix_dims[rows:])

    def blocks(self, multiple: int, elements: int) -> list[Part]:
        """Its tensors cut into blocks of whole rows, as parts of `matrix_dims`.

        Of at most about so many elements each, in multiples of so many rows and of whole heads, and as even as these
        allow: an array keeps every block, the last one too, in the size of the first.
        """
        outer, *inner = self.matrix_dims[: len(self.row_dims)]
        rows_each = math.prod(inner)
        unit = math.lcm(rows_each, multiple) // rows_each
        units, most = -(-outer // unit), max(1, elements // (unit * math.prod(self.matrix_dims[1:])))
        step = unit * -(-units // -(-units // most))
        rest = tuple(slice(0, size) for size in self.matrix_dims[1:])
        return [(slice(first, min(first + step, outer)), *rest) for first in range(0, outer, step)]

    def indices(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*map(range, self.index_sizes))

    def tensor(self, index: tuple[int, ...]) -> str:
        """Name of the tensor at an index of the index dims."""
        letters = {self._dims[dim]: value for dim, value in zip(self.index_dims, index, strict=True)}
        if "L" in letters:
            letters["L"] += self._first_layer
        fields: dict[str, str | int] = dict(letters)
        if "c" in letters:
            fields["c"] = GATE_AND_UP[letters["c"]]
        return self._name.format(**fields)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names of all its tensors with their indices."""
        for index in self.indices():
            yield self.tensor(index), index


def leaves_of(model: ModelConfig) -> list[Leaf]:
    """Every parameter and router bias of a model of this shape. Allocates nothing."""
    parameters, router_bias = abstract_trees(skeleton_of(model))
    found = jax.tree_util.tree_leaves_with_path({"parameters": parameters, "router_bias": router_bias})
    return [_leaf(model, tuple(key.key for key in path), leaf.shape) for path, leaf in found]


def copies_of(model: ModelConfig) -> dict[str, str]:
    """Tensors that repeat another one, by name: the MTP layers' embeddings and heads."""
    return {
        f"model.layers.{model.layers + depth}.{copy}": original
        for depth in range(model.mtp_depth)
        for copy, original in MTP_COPIES.items()
    }


def _leaf(model: ModelConfig, path: tuple[str | int, ...], shape: tuple[int, ...]) -> Leaf:
    match path[1:]:
        case ("dense_blocks" | "moe_blocks" as stack, *inside):
            rule = BLOCK[_dotted(inside)]
            first = 0 if stack == "dense_blocks" else model.dense_layers
            return Leaf(path, shape, rule._replace(dims="L" + rule.dims), "model.layers.{L}.", first)
        case ("mtp", int(depth), "block", *inside):
            return Leaf(path, shape, BLOCK[_dotted(inside)], f"model.layers.{model.layers + depth}.", 0)
        case ("mtp", int(depth), *inside):
            return Leaf(path, shape, MTP[_dotted(inside)], f"model.layers.{model.layers + depth}.", 0)
        case inside:
            return Leaf(path, shape, TOP[_dotted(inside)], "", 0)


def _flat(part: Part, sizes: tuple[int, ...]) -> slice:
    if not sizes:
        return slice(0, 1)
    outer, *inner = part
    assert all((one.start, one.stop) == (0, size) for one, size in zip(inner, sizes[1:], strict=True))
    each = math.prod(sizes[1:])
    return slice(outer.start * each, outer.stop * each)


def _dotted(keys: "tuple[str | int, ...] | list[str | int]") -> str:
    return ".".join(map(str, keys))
