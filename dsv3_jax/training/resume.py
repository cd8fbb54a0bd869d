"""Which runs may go on from a saved one: a resumed run must be the uninterrupted one.

Everything that decides a number of the run is fixed by its first start, the length included: the learning rate, the
MTP weight and the bias speed follow shares of `training.tokens`, so a longer run is a different run from its first
step. What is left free changes what is written and when, or where memory goes (results then agree to rounding).
"""

import dataclasses
from pathlib import Path
from typing import Any

from dsv3_jax.config import Config, ConfigError, from_json, to_json
from dsv3_jax.files import write_atomically
from dsv3_jax.training.checkpoint import CheckpointError

FREE_ON_RESUME = frozenset(
    {
        "checkpoint.interval",
        "checkpoint.keep",
        "training.log_interval",
        "training.validation_interval",
        "training.sample_tokens",
        "training.microbatches",
        "task.verifier_processes",
        "task.verifier_seconds",
        "model.remat",
        "model.dispatch_factor",
        "model.dispatch_once_a_node",
        "mesh.data",
        "mesh.fsdp",
        "mesh.node",
        "mesh.expert",
        "mesh.context",
        "mesh.tensor",
    }
)
"""Fields that may change when a run resumes."""

FREE_ON_INIT = frozenset(
    {
        "model.yarn_factor",
        "model.yarn_original_length",
        "model.yarn_beta_fast",
        "model.yarn_beta_slow",
        "model.yarn_mscale",
        "model.yarn_mscale_all_dim",
        "model.maximum_positions",
        "model.initializer_std",
        "model.precision",
        "model.float8_scales",
        "model.float8_tiles",
        "model.remat",
        "model.dispatch_factor",
        "model.dispatch_once_a_node",
    }
)
"""Model fields that may change when a run starts from another's parameters: none changes an array or what it means."""


class OtherRunError(CheckpointError):
    """A command whose configuration contradicts the saved run it would continue."""

    exit_code = 2


def write_config(workdir: Path, config: Config) -> None:
    write_atomically(workdir / "config.json", to_json(config))


def read_config(workdir: Path) -> Config | None:
    """The configuration of the run in `workdir`, None where there is none.

    Raises:
        CheckpointError: config.json is not one of this version's.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def refuse_other_run(saved: Config, current: Config, workdir: Path) -> None:
    """Refuse to resume the run in `workdir` under a configuration that would give other numbers.

    Raises:
        OtherRunError: names the first field that differs and is not in FREE_ON_RESUME, and both values.
    """
    for name, before, now in differences(saved, current):
        if name not in FREE_ON_RESUME:
            raise OtherRunError(
                f"{name}: the run in {workdir} has {before!r}, this command {now!r}; use the same value to resume it, "
                "or another --workdir for a new run"
            )


def refuse_other_model(saved: Config, current: Config, source: Path) -> None:
    """Refuse to start from the parameters in `source` where they would not mean the same in this model.

    Raises:
        OtherRunError: names the first model field that differs and is not in FREE_ON_INIT, and both values.
    """
    for name, before, now in differences(saved, current):
        if name.startswith("model.") and name not in FREE_ON_INIT:
            raise OtherRunError(
                f"{name}: the model in {source} has {before!r}, this run {now!r}; --init needs one value"
            )


def differences(saved: Config, current: Config) -> list[tuple[str, Any, Any]]:
    """Dotted names of the fields that differ, in the order of the configuration, with both values."""
    before, now = _fields(saved), _fields(current)
    return [(name, before[name], now[name]) for name in now if before[name] != now[name]]


def _fields(config: Config) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for section, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            named |= {f"{section}.{name}": each for name, each in value.items()}
        else:
            named[section] = value
    return named
