"""What a model loses when it is exported in a smaller type.

python -m benchmarks.type_loss [WORKDIR, by default runs/tiny]

Exports a trained model in every type, loads what was written, in float32, and compares: bytes, the error of the weights
(root of the mean square, relative to the weights), and the validation loss over the same held-out text.
"""

import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.command_line import run_main
from dsv3_jax.convert.exporting import export_checkpoint
from dsv3_jax.convert.opening import OpenedModel, open_model
from dsv3_jax.convert.outputs import size_of
from dsv3_jax.data.corpus import open_corpus
from dsv3_jax.data.pipeline import validation_batches
from dsv3_jax.loading import tokenizer_of
from dsv3_jax.model.functional import abstract_trees, skeleton_of
from dsv3_jax.training.evaluation import make_evaluate
from sharding.mesh import one_device

BATCHES = 40
KINDS: dict[str, dict[str, Any]] = {
    "f32": {"dtype": "f32"},
    "bf16": {"dtype": "bf16"},
    "fp8": {"dtype": "fp8"},
    "fp8, ue8m0": {"dtype": "fp8", "scale_format": "ue8m0"},
}


def main() -> None:
    workdir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")
    opened = open_model(workdir)
    config, skeleton, tokenizer = opened.config, skeleton_of(opened.config.model), tokenizer_of(opened)
    corpus = open_corpus(config.data)
    batches = list(islice(validation_batches(corpus.validation, tokenizer, config), BATCHES))
    evaluate = make_evaluate(config, skeleton, one_device())

    def trees(model: OpenedModel) -> dict[str, Any]:
        return model.read(dict(zip(("parameters", "router_bias"), abstract_trees(skeleton), strict=True)))

    before = trees(opened)
    loss = evaluate(before["parameters"], before["router_bias"], batches).loss
    print(f"{workdir}: validation loss {loss:.5f} nats a token over {len(batches)} batches")
    print(f"{'type':<12} {'MB':>8} {'error of the weights':>21} {'loss':>9} {'change':>9}")
    for name, options in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            size = sum(map(size_of, export_checkpoint(workdir, out, **options)))
            after = trees(open_model(out))
        changed = evaluate(after["parameters"], after["router_bias"], batches).loss
        error = relative_error(before["parameters"], after["parameters"])
        print(f"{name:<12} {size / 1e6:>8.2f} {error:>20.4%} {changed:>10.5f} {changed - loss:>+9.5f}")


def relative_error(before: Any, after: Any) -> float:
    """Of all matrices together."""
    pairs = [
        (np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]
    matrices = [(x, y) for x, y in pairs if x.ndim > 1]
    squares = sum(float(np.square(x).sum()) for x, _ in matrices)
    return (sum(float(np.square(x - y).sum()) for x, y in matrices) / squares) ** 0.5


if __name__ == "__main__":
    run_main(main)
