"""Checkpoints of a run: written in the background by Orbax, complete in themselves, committed by a rename.

    checkpoints/STEP/state/                    parameters, optimizer, router bias, keys: every array of the run
                     data/data.json            position in the data
                     config/config.json        the run's configuration
                     tokenizer/tokenizer.json
                     hugging_face/              of a model that came from elsewhere: its other texts

so the folder of one step is all that inference, fine-tuning or a colleague needs.
"""

import dataclasses
import functools
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dsv3_jax.config import Config, ConfigError, from_json
from dsv3_jax.errors import UserError

PyTree = Any

CHUNK_BYTES = 64 * 2**20
"""Larger arrays are written in chunks of about that, so that a part can be read without the whole."""

MODEL_PARTS = ("state/_METADATA", "config/config.json")
"""What makes a folder a model that can be opened."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, found or read. The message names the folder."""


class Restored(NamedTuple):
    """What a run needs to go on exactly where it was."""

    step: int
    """Optimizer steps done."""
    state: PyTree
    data_state: dict[str, Any]


class SavedModel(NamedTuple):
    """One checkpoint on disk, opened for its model alone."""

    directory: Path
    config: Config
    tokenizer: str | None
    """Text of tokenizer.json; an imported model may come without."""
    hugging_face: dict[str, Any] | None
    """Of a model that came from a Hugging Face directory: its "config", its other texts as "files", and, until it is
    trained, as "tensors", in what form its arrays are kept."""


class Checkpoints:
    """The checkpoints of one run, `config.checkpoint.keep` newest kept. Several processes: all call every method.

    Saving costs the caller the copy to host memory; the rest happens in a thread. A save that fails there raises
    CheckpointError from the next `check`, `save`, `wait` or `close`; the checkpoints before it stay.
    """

    def __init__(self, directory: Path, config: Config, tokenizer: str, hugging_face: dict[str, Any] | None = None):
        """`tokenizer`, the text of tokenizer.json, and `hugging_face` are kept in every checkpoint as `config` is."""
        quiet_orbax()
        self.directory = directory.resolve()
        self._texts = {"config": dataclasses.asdict(config), "tokenizer": json.loads(tokenizer)}
        if hugging_face:
            self._texts["hugging_face"] = {name: hugging_face[name] for name in ("config", "files")}
        handlers: dict[str, Any] = {
            "state": ocp.PyTreeCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler("data.json"),
            **{name: ocp.JsonCheckpointHandler(f"{name}.json") for name in self._texts},
        }
        with self._failing("keep checkpoints", OSError):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(max_to_keep=config.checkpoint.keep, cleanup_tmp_directories=True),
                item_names=tuple(handlers),
                item_handlers=handlers,
            )

    def save(self, step: int, state: PyTree, data_state: dict[str, Any]) -> None:
        """Begin to save, once the save before has ended.

        `state` is a pytree of jax arrays, which the caller may donate or overwrite as soon as this returns;
        `data_state` goes through JSON. A step that is already saved is left alone.
        """
        self.wait()
        if step in complete_steps(self.directory):
            return
        with self._failing(f"write checkpoint {step}", OSError):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state, save_args=_in_chunks(state)),
                    data=ocp.args.JsonSave(data_state),
                    **{name: ocp.args.JsonSave(text) for name, text in self._texts.items()},
                ),
                force=True,
            )

    def restore_latest(self, abstract_state: PyTree) -> Restored | None:
        """The newest complete checkpoint, or None where there is none.

        `abstract_state` gives structure, shapes, types and shardings: arrays, or `jax.ShapeDtypeStruct`s.
        """
        steps = complete_steps(self.directory)
        if not steps:
            return None
        directory = self.directory / str(steps[-1])
        state = restore_part(directory, abstract_state, whole=True)
        return Restored(steps[-1], state, json.loads((directory / "data" / "data.json").read_text()))

    def check(self) -> None:
        """Raise CheckpointError if a save in the background has failed; costs nothing, for every step of the loop."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        with self._failing("write a checkpoint", OSError, ValueError, RuntimeError):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then release the background threads."""
        with self._failing("write a checkpoint", OSError, ValueError, RuntimeError):
            self._manager.close()

    @contextmanager
    def _failing(self, doing: str, *kinds: type[Exception]) -> Iterator[None]:
        # TensorStore reports a full disk as ValueError or RuntimeError, but only from the background thread.
        try:
            yield
        except kinds as error:
            good = complete_steps(self.directory)
            kept = f"step {good[-1]} is the last good one" if good else "there is no earlier one"
            raise CheckpointError(f"cannot {doing} in {self.directory}: {_reason(error)}; {kept}") from error


def _in_chunks(state: PyTree) -> PyTree:
    """How Orbax is to divide every array: between layers and between experts before anywhere else."""

    def one(path: tuple[Any, ...], array: Any) -> ocp.SaveArgs:
        if getattr(array, "nbytes", 0) <= CHUNK_BYTES:
            return ocp.SaveArgs()
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        index_dims = ("dense_blocks" in names or "moe_blocks" in names) + ("experts" in names)
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(index_dims)))

    return jax.tree_util.tree_map_with_path(one, state)


def complete_steps(directory: Path) -> list[int]:
    """Steps of the committed checkpoints in a `checkpoints` folder, rising.

    Orbax writes under a temporary name and renames when all is on disk; a folder with a part missing never counts.
    """
    if not directory.is_dir():
        return []
    parts = (*MODEL_PARTS, "data/data.json", "tokenizer/tokenizer.json")
    found = (child for child in directory.iterdir() if child.name.isdecimal())
    return sorted(int(child.name) for child in found if all((child / part).is_file() for part in parts))


def open_checkpoint(path: Path) -> SavedModel:
    """The model saved in a workdir, a `checkpoints` folder (the newest step of it), the folder of one step, or one that
    was imported.

    Raises:
        CheckpointError: no complete checkpoint there, or one of another version of this code.
    """
    directory = _step_folder(path.resolve())
    if directory is None:
        raise CheckpointError(
            f"{path} holds no checkpoint: give a workdir, its checkpoints folder or one step's folder"
        )
    try:
        config = from_json((directory / "config" / "config.json").read_text())
    except ConfigError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    tokenizer, texts = directory / "tokenizer" / "tokenizer.json", directory / "hugging_face" / "hugging_face.json"
    try:
        came_with = json.loads(texts.read_text(encoding="utf-8")) if texts.is_file() else None
    except ValueError as error:
        raise CheckpointError(f"{texts} is damaged: {error}") from error
    return SavedModel(
        directory, config, tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else None, came_with
    )


def restore_part(directory: Path, abstract: PyTree, *, whole: bool = False) -> PyTree:
    """Arrays of the checkpoint in one step's folder, in the structure of `abstract`; nothing else is read.

    `{"parameters": ...}` reads the parameters and no optimizer. Arrays are converted to the leaf's type and placed by
    its sharding, on the first device where it has none. With `whole`, `abstract` must name every array there is.

    Raises:
        CheckpointError: an array is missing, of another shape, or unreadable.
    """
    quiet_orbax()
    target = jax.tree.map(_with_sharding, abstract)
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    arguments = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=not whole)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            _require_same_arrays(directory, reader.metadata(directory.resolve() / "state").item_metadata, target, whole)
            return reader.restore(directory.resolve() / "state", args=arguments)
    except CheckpointError:
        raise
    except Exception as error:  # Orbax wraps an unreadable file in a bare Exception
        raise CheckpointError(
            f"cannot read checkpoint {directory}: {_reason(error)}; remove that folder to use the one before it"
        ) from error


def _require_same_arrays(directory: Path, saved: PyTree, target: PyTree, whole: bool) -> None:
    # Asked for an array it does not have, a partial restore hands back the question; we name the array instead.
    saved_shapes, target_shapes = _shapes(saved), _shapes(target)
    for name, shape in target_shapes.items():
        if name not in saved_shapes:
            raise CheckpointError(f"checkpoint {directory} has no array {name}: it is of another model")
        if saved_shapes[name] != shape:
            raise CheckpointError(
                f"checkpoint {directory} is of another model: {name} is {saved_shapes[name]} there, {shape} here"
            )
    if whole and (extra := saved_shapes.keys() - target_shapes.keys()):
        raise CheckpointError(f"checkpoint {directory} is of another model: there is no {min(extra)} here")


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _step_folder(path: Path) -> Path | None:
    for directory in (path / "checkpoints", path):
        if steps := complete_steps(directory):
            return directory / str(steps[-1])
    if path.name.isdecimal():
        return path if int(path.name) in complete_steps(path.parent) else None
    return path if all((path / part).is_file() for part in MODEL_PARTS) else None


def _reason(error: BaseException) -> str:
    """The first line of the error beneath all wrappers, which for Orbax and TensorStore says what failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


@functools.cache
def quiet_orbax() -> None:
    """Keep what Orbax raises as the only word on a failed save."""
    # It tells every stage at INFO, and logs a failure with its traceback besides raising it; asyncio logs those of its
    # writes that it, having seen one fail, does not wait for.
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    # Those writes end when its event loop has been closed, a traceback each, or never start, a warning each.
    warnings.filterwarnings("ignore", r"coroutine 'async_serialize.* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def report_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others
