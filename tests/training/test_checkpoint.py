"""Checkpoints: bit-identical, complete in themselves, never half there, and loud when they fail."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.tiny import config as tiny
from dsv3_jax.config import CheckpointConfig
from dsv3_jax.training.checkpoint import CheckpointError, Checkpoints, complete_steps, open_checkpoint, restore_part

TOKENIZER = json.dumps({"model": {"vocab": {"é": 0, "\n": 1}}, "version": "1.0"})
KEEP_TWO = dataclasses.replace(tiny, checkpoint=CheckpointConfig(keep=2))


class TrainState(NamedTuple):
    parameters: dict[str, Any]
    router_bias: jax.Array
    optimizer: optax.OptState
    key: jax.Array
    step: jax.Array


def _state(seed: int) -> TrainState:
    first, second = jax.random.split(jax.random.key(seed))
    parameters = {"head": jax.random.normal(first, (33, 7)), "mtp": {0: {"norm": {"gain": jnp.ones(5)}}}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    grads = jax.tree.map(lambda leaf: leaf * 1e-3, parameters)
    _, moments = optimizer.update(grads, optimizer.init(parameters), parameters)
    bias = jnp.array([0.001, -0.0, jnp.inf], jnp.float32)
    return TrainState(parameters, bias, moments, jax.random.key_data(second), jnp.int32(seed))


def _open(directory: Path, keep: int = 2) -> Checkpoints:
    config = dataclasses.replace(tiny, checkpoint=CheckpointConfig(keep=keep))
    return Checkpoints(directory, config, TOKENIZER)


def _assert_same_bits(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_state_comes_back_bit_for_bit(tmp_path):
    first = _open(tmp_path)
    assert first.restore_latest(_state(0)) is None
    for step in (3, 5, 9):
        first.save(step, _state(step), {"next_index": step, "nested": {"list": [1, None, "é"]}})
    first.close()
    second = _open(tmp_path)
    restored = second.restore_latest(jax.eval_shape(lambda: _state(0)))
    assert (restored.step, restored.data_state) == (9, {"next_index": 9, "nested": {"list": [1, None, "é"]}})
    _assert_same_bits(restored.state, _state(9))
    assert complete_steps(tmp_path) == [5, 9]
    second.close()


def test_saving_a_saved_step_again_is_no_error(tmp_path):
    checkpoints = _open(tmp_path)
    checkpoints.save(4, _state(4), {})
    checkpoints.save(4, _state(5), {})
    checkpoints.close()
    _assert_same_bits(restore_part(tmp_path / "4", _state(0)), _state(4))


def test_the_step_after_may_overwrite_what_is_being_saved(tmp_path):
    checkpoints = _open(tmp_path)
    big = jnp.arange(4_000_000, dtype=jnp.float32)
    step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    checkpoints.save(1, {"x": big}, {})
    for _ in range(3):
        big = step(big)
    checkpoints.close()
    restored = restore_part(tmp_path / "1", {"x": big})
    np.testing.assert_array_equal(restored["x"], np.arange(4_000_000, dtype=np.float32))


def test_one_step_folder_is_a_whole_model_wherever_it_is(tmp_path):
    checkpoints = _open(tmp_path / "run/checkpoints")
    for step in (1, 10, 9):
        checkpoints.save(step, _state(step), {})
    checkpoints.close()
    shutil.copytree(tmp_path / "run/checkpoints/9", tmp_path / "9")
    shutil.rmtree(tmp_path / "run/checkpoints/1", ignore_errors=True)
    for path, step in {"run": 10, "run/checkpoints": 10, "run/checkpoints/9": 9, "9": 9}.items():
        saved = open_checkpoint(tmp_path / path)
        assert (int(saved.directory.name), saved.config, json.loads(saved.tokenizer)) == (
            step,
            KEEP_TWO,
            json.loads(TOKENIZER),
        )
        part = {"router_bias": _state(0).router_bias, "parameters": jax.eval_shape(lambda: _state(0).parameters)}
        restored = restore_part(saved.directory, part)
        _assert_same_bits(restored, {"router_bias": _state(step).router_bias, "parameters": _state(step).parameters})


def test_inference_reads_no_optimizer(tmp_path):
    checkpoints = _open(tmp_path)
    moments = jax.random.normal(jax.random.key(0), (500_000,))
    checkpoints.save(1, {"parameters": {"w": jnp.ones(4)}, "optimizer": moments}, {})
    checkpoints.close()
    for file in (tmp_path / "1/state").rglob("d/*"):
        if file.stat().st_size > 100_000:
            file.write_bytes(b"")  # the optimizer's bytes, the only large ones, are gone
    assert restore_part(tmp_path / "1", {"parameters": {"w": jnp.zeros(4)}})["parameters"]["w"].sum() == 4
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        restore_part(tmp_path / "1", {"optimizer": jnp.zeros(500_000)})


def test_a_part_may_be_read_in_another_type(tmp_path):
    checkpoints = _open(tmp_path)
    checkpoints.save(1, {"w": jnp.array([1.0, 1.003])}, {})
    checkpoints.close()
    restored = restore_part(tmp_path / "1", {"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16)})["w"]
    assert restored.dtype == jnp.bfloat16 and restored.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"w": jnp.zeros(3), "n": jnp.int32(0)}, r"w is \(2, 5\) there, \(3,\) here"),
        ({"v": jnp.zeros(3), "w": jnp.zeros((2, 5)), "n": jnp.int32(0)}, "has no array v"),
        ({"w": jnp.zeros((2, 5))}, "there is no n here"),
    ],
)
def test_a_state_of_another_model_is_refused_by_name(target, message, tmp_path):
    checkpoints = _open(tmp_path)
    checkpoints.save(1, {"w": jnp.zeros((2, 5)), "n": jnp.int32(0)}, {})
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore_latest(target)
    checkpoints.close()


def test_what_was_not_committed_does_not_count(tmp_path):
    checkpoints = _open(tmp_path)
    checkpoints.save(1, _state(1), {})
    checkpoints.close()
    for part in ("state", "data", "config", "tokenizer"):
        shutil.copytree(tmp_path / "1", tmp_path / f"2{len(part)}")
        shutil.rmtree(tmp_path / f"2{len(part)}" / part)
    shutil.copytree(tmp_path / "1", tmp_path / "30.orbax-checkpoint-tmp")
    (tmp_path / "40").mkdir()
    assert complete_steps(tmp_path) == [1]
    again = _open(tmp_path)
    assert again.restore_latest(_state(0)).step == 1
    again.save(2, _state(2), {})
    again.close()
    assert open_checkpoint(tmp_path).directory.name == "2"


def test_nothing_there_is_said_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint: give a workdir"):
        open_checkpoint(tmp_path / "absent")


def test_a_full_disk_is_told_and_costs_no_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoints = _open(tmp_path, keep=1)
    checkpoints.save(1, _state(1), {})
    checkpoints.wait()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        patch.setattr(os, "replace", full)
        checkpoints.save(2, _state(2), {})
        with pytest.raises(CheckpointError, match="No space left on device; step 1 is the last good one") as caught:
            checkpoints.wait()
    assert "\n" not in str(caught.value)
    _assert_same_bits(checkpoints.restore_latest(_state(0)).state, _state(1))
    checkpoints.save(3, _state(3), {})
    checkpoints.close()
    _assert_same_bits(restore_part(tmp_path / "3", _state(0)), _state(3))


def _python(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )


def test_a_write_that_fails_in_the_background_reaches_the_loop(tmp_path):
    run = _python(
        f"""
        import resource, time
        from pathlib import Path
        import jax
        from configs.tiny import config
        from dsv3_jax.command_line import run_main
        from dsv3_jax.training.checkpoint import Checkpoints

        def main():
            checkpoints = Checkpoints(Path({str(tmp_path)!r}), config, "{{}}")
            state = {{"w": jax.random.normal(jax.random.key(0), (1000, 500))}}
            checkpoints.save(1, state, {{}})
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
            checkpoints.save(2, state, {{}})
            for step in range(600):
                checkpoints.check()
                time.sleep(0.05)

        run_main(main)
        """
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"error: cannot write a checkpoint in {tmp_path}") and "File too large" in line
    assert "step 1 is the last good one" in line
    assert complete_steps(tmp_path) == [1]


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    run = _python(
        f"""
        import os, signal
        from pathlib import Path
        import jax.numpy as jnp
        from configs.tiny import config
        from dsv3_jax.training.checkpoint import Checkpoints

        checkpoints = Checkpoints(Path({str(tmp_path)!r}), config, "{{}}")
        checkpoints.save(1, {{"w": jnp.ones(3)}}, {{"position": 1}})
        checkpoints.wait()
        os.rename = os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(2, {{"w": jnp.zeros(3)}}, {{"position": 2}})
        checkpoints.wait()
        """
    )
    assert run.returncode == -signal.SIGKILL
    assert [name for name in os.listdir(tmp_path) if name.startswith("2")]
    checkpoints = _open(tmp_path)
    restored = checkpoints.restore_latest({"w": jnp.zeros(3)})
    assert (restored.step, restored.data_state, restored.state["w"].tolist()) == (1, {"position": 1}, [1, 1, 1])
    checkpoints.save(2, {"w": jnp.full(3, 2.0)}, {})
    checkpoints.close()
    assert restore_part(tmp_path / "2", {"w": jnp.zeros(3)})["w"].tolist() == [2, 2, 2]
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_checkpoint_moves_between_numbers_of_devices(tmp_path):
    program = """
        import sys
        from pathlib import Path
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from configs.tiny import config
        from dsv3_jax.training.checkpoint import Checkpoints

        folder, step, split = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
        mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        by = NamedSharding(mesh, PartitionSpec(*(name or None for name in split)))
        expected = np.arange(96, dtype=np.float32).reshape(8, 12)
        checkpoints = Checkpoints(folder, config, "{}")
        found = checkpoints.restore_latest({"w": jax.ShapeDtypeStruct((8, 12), np.float32, sharding=by)})
        state = found.state if found else {"w": jax.device_put(expected, by)}
        assert (state["w"].sharding, found.step if found else 0) == (by, step - 1)
        np.testing.assert_array_equal(state["w"], expected)
        checkpoints.save(step, state, {})
        checkpoints.close()
        """
    for step, (devices, *split) in enumerate([(4, "data"), (1, "data"), (2, "", "data")], start=1):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(step), *split],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
    assert complete_steps(tmp_path) == [2, 3]
