import dataclasses
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from jax.sharding import Mesh

from dsv3_jax.model_config import ModelConfig
from dsv3_jax.runtime import use_multi_output_fusion
from sharding.mesh import axis_sizes, make_mesh

# Before any test starts jax: what train.py and infer.py compile with, and devices for a mesh. They are not set in the
# environment, so that a process a test starts has one device, as a laptop has.
use_multi_output_fusion()
jax.config.update("jax_num_cpu_devices", 8)

# Compiling is most of what the tests do, and nearly all programs run a few times only. So machine code is made with
# less work, in the processes that tests start too; XLA's passes before that stay what they are, fusion included. Three
# programs of decoding (tests/inference/test_speculation.py) compile in 17.7 s of CPU time by default, in 8.7 s without
# LLVM's optimisations, and in 5.3 s if, moreover, no fusion is taken through MLIR; jax 0.11 leaves no such choice, and
# ends at a flag that it does not know.
OLDER_EMITTERS = " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
UNOPTIMIZED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ["XLA_FLAGS"] += OLDER_EMITTERS
os.environ[UNOPTIMIZED] = "1"
jax.config.update("jax_disable_most_optimizations", True)

TINY = ModelConfig(
    vocabulary=48,
    width=36,
    layers=3,
    dense_layers=1,
    dense_ffn_width=40,
    heads=3,
    query_latent=12,
    key_value_latent=16,
    nope_head_dim=10,
    rope_head_dim=8,
    value_head_dim=6,
    experts=8,
    experts_per_token=3,
    shared_experts=1,
    expert_ffn_width=12,
    expert_groups=4,
    groups_per_token=2,
    score_function="sigmoid",
    group_score="top2_sum",
    normalize_weights=True,
    routed_scale=2.5,
    selection_bias=True,
    mtp_depth=1,
    initializer_std=0.2,
    precision="float32",
    remat="none",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
    """A program of XLA:CPU holds some of the 65,530 memory maps that Linux grants a process; compiling beyond them
    ends it with a segmentation fault. All modules together have more."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """For modules whose programs compute for longer than they compile, or are what LLVM makes of them.

    The processes that they start compile as a user's do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(UNOPTIMIZED)
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].removesuffix(OLDER_EMITTERS))
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., ModelConfig]:
    """`tiny_model(**changes)`: every part of the architecture, no two dims equal that could be confused."""
    return lambda **changes: dataclasses.replace(TINY, **changes)


@pytest.fixture(scope="session")
def mesh_with() -> Callable[..., Mesh]:
    """`mesh_with(data=2, expert=4)`: a mesh of the first devices, the other axes 1."""

    def make(**sizes: int) -> Mesh:
        devices = jax.devices()[: math.prod(sizes.values())]
        return make_mesh(axis_sizes({"data": -1, **sizes}, len(devices)), devices)

    return make


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder of small text files."""
    folder, chosen = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = "def return self list range print value index token expert layer".split()
    for number in range(12):
        lines = [" ".join(chosen.choices(words, k=8)) for _ in range(30)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder
