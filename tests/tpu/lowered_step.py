"""Lowers a training step for eight devices of tpu7x, and prints what of it multiplies and sends what, as JSON.

One layer of DeepSeek-V3 at its widths, with 32 experts. A process of its own: libtpu wants to be there before jax.
"""

import dataclasses
import json
import math
import re
import sys

from dsv3_jax.plan.topology import set_up_libtpu, topology

set_up_libtpu()

from configs.v3_671b import config as v3_671b  # noqa: E402
from dsv3_jax.model.functional import skeleton_of  # noqa: E402
from dsv3_jax.plan.operations import matrix_flops  # noqa: E402
from dsv3_jax.plan.plan import plan_work  # noqa: E402
from dsv3_jax.plan.programs import traced_training_step  # noqa: E402

BYTES = {"ui8": 1, "bf16": 2, "f32": 4, "i32": 4}


def main(precision: str) -> None:
    shape = {"layers": 1, "dense_layers": 0, "mtp_depth": 0, "experts": 32, "vocabulary": 1024}
    model = dataclasses.replace(v3_671b.model, precision=precision, remat="up_projections", **shape)
    training = dataclasses.replace(v3_671b.training, batch_size=8, microbatches=1)
    mesh = dataclasses.replace(v3_671b.mesh, data=1, expert=8)
    config = dataclasses.replace(v3_671b, model=model, training=training, mesh=mesh)
    work = plan_work(config, topology("tpu7x:2x2x1"), "train", None, None)
    traced, _ = traced_training_step(config, skeleton_of(model), work.mesh)
    lines = traced.lower().as_text().splitlines()
    kernels = [
        _operands(line) for line in lines if "tpu_custom_call" in line and re.search(r'"(grouped_)?matmul', line)
    ]
    sent = [_operands(line)[0] for line in lines if "ragged_all_to_all" in line]
    flops = matrix_flops(traced.jaxpr.jaxpr, 1.0)
    print(json.dumps({"kernels": [[dtype for dtype, _ in each] for each in kernels], "sent": sent, "flops": flops}))


def _operands(line: str) -> list[tuple[str, int]]:
    """Type and bytes of each array that an operation takes."""
    found = []
    for shape, dtype in re.findall(r"tensor<((?:\d+x)*)(\w+)>", line.rpartition(" : (")[2].partition(") ->")[0]):
        found.append((dtype, math.prod(int(size) for size in shape.split("x") if size) * BYTES.get(dtype, 1)))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
