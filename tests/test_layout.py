"""A configuration on a mesh: refused where it does not fit, described without allocating anything."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs.tiny import config as tiny
from configs.v3_671b import config as v3_671b
from dsv3_jax.config import Config
from dsv3_jax.layout import describe, mesh_of
from dsv3_jax.model.functional import abstract_trees, skeleton_of
from sharding.mesh import LayoutError

ROOT = Path(__file__).parents[1]


def _on(config: Config, **mesh: int) -> Config:
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))


def test_by_default_every_device_takes_rows():
    assert dict(mesh_of(tiny, skeleton_of(tiny.model)).shape) == {"data": 8}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"expert": 3}, "mesh.expert=3 makes 3, which must divide the number of devices, 8"),
        ({"tensor": 8}, "mesh.tensor=8 must divide its 'heads' of 4; their product may be 1, 2, 4"),
        (
            {"context": 8, "sequence_length": 40},
            "must divide training.sequence_length=40; mesh.context may be 1, 2, 4,",
        ),
        ({"data": 8, "microbatches": 4}, "mesh.data=8 must divide the rows of a microbatch, training.batch_size / "),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_what_would(mesh, message):
    training = {name: mesh.pop(name) for name in ("microbatches", "sequence_length") if name in mesh}
    config = _on(tiny, **mesh)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **training))
    with pytest.raises(LayoutError, match=re.escape(message)):
        mesh_of(config, skeleton_of(config.model))


def test_a_description_of_671b_counts_every_parameter_once_over_the_devices():
    skeleton = skeleton_of(v3_671b.model)
    lines = describe(_on(v3_671b, fsdp=2, expert=64), skeleton, devices=1).splitlines()
    assert lines[0] == "mesh: fsdp 2 x expert 64 = 128 devices"
    (experts,) = [line for line in lines if line.startswith("moe_blocks.feed_forward.experts.gate_up ")]
    assert "58 x 256 x 7168 x 2 x 2048" in experts and "experts: expert, expert_width: fsdp" in experts
    assert experts.endswith(f"{4 * 58 * 256 * 7168 * 2 * 2048 // 128:,}")
    sizes = {name: math.prod(leaf.shape) for name, leaf in _named(abstract_trees(skeleton)[0])}
    assert len(lines) == len(sizes) + 3
    expected = sum(4 * size // (1 if name.endswith("gain") else 128) for name, size in sizes.items())
    assert f"float32 parameters {expected:,} bytes a device" in lines[-1]


def test_the_rest_is_what_devices_there_are():
    assert describe(_on(tiny, expert=2), skeleton_of(tiny.model), devices=8).startswith("mesh: data 4 x expert 2 = 8")
    assert describe(tiny, skeleton_of(tiny.model), devices=1).startswith("mesh: one device\n")


def test_describe_trains_nothing_and_a_bad_mesh_is_one_line(tmp_path):
    def run(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "train.py", "--config=tiny", f"--workdir={tmp_path}/run", "--describe", *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    described = run("--mesh.expert=4")
    assert described.returncode == 0 and described.stdout.startswith("mesh: expert 4 = 4 devices\nparameter")
    refused = run("--mesh.tensor=3")
    assert refused.returncode == 2 and refused.stdout == ""
    assert re.fullmatch(r"error: parameter .*: mesh.tensor=3 must divide its 'heads' of 4; .*\n", refused.stderr)
    assert not (tmp_path / "run").exists()


def _named(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf
