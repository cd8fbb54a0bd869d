"""Directories whose headers are in order: what their scales and biases hold, what is not there, and their code."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_jax.convert.directory import open_directory
from dsv3_jax.convert.exporting import export_checkpoint
from dsv3_jax.convert.importing import import_checkpoint
from dsv3_jax.convert.inventory import opened_inventory, take_inventory
from dsv3_jax.convert.opening import open_model
from dsv3_jax.model.functional import abstract_trees, skeleton_of
from dsv3_jax.training.checkpoint import CheckpointError, open_checkpoint
from tests.reference.hf_checkpoint import fabricate
from tests.reference.hf_folder import BIAS, DOWN, UP, Folder, filled, nothing_written, refusal


@pytest.fixture(scope="module")
def good(tiny_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good")
    fabricate(path, tiny_model(width=132, dense_ffn_width=260), dtype="fp8", shards=3)
    return path


@pytest.fixture
def folder(good, tmp_path) -> Folder:
    shutil.copytree(good, tmp_path / "in")
    return Folder(tmp_path / "in")


@pytest.fixture(scope="module")
def imported_once(good, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("imported") / "imported"
    import_checkpoint(good, path)
    return path


@pytest.fixture
def imported(imported_once, tmp_path) -> Path:
    return shutil.copytree(imported_once, tmp_path / "imported")


def _value(name: str, value: float, place: tuple[int, ...]) -> Callable[[Folder], None]:
    def breaks(folder: Folder) -> None:
        tensor = folder.tensor(name)
        tensor[place] = value
        folder.put(name, tensor)

    return breaks


BAD_VALUES = {
    "NaN scale": (_value(DOWN + "_scale_inv", float("nan"), (1, 2)), [f"tensor {DOWN}_scale_inv", "nan at [1, 2]"]),
    "infinite scale": (_value(UP + "_scale_inv", float("inf"), (0, 1)), [f"tensor {UP}_scale_inv", "inf at [0, 1]"]),
    "negative scale": (
        _value(DOWN + "_scale_inv", -0.5, (0, 1)),
        [f"{DOWN}_scale_inv", "-0.5 at [0, 1]", "not negative"],
    ),
    "NaN bias": (_value(BIAS, float("nan"), (3,)), [f"{{BIAS}}: tensor {BIAS} has nan at [3]", "must be finite"]),
    "infinite bias": (_value(BIAS, float("-inf"), (0,)), [f"{{BIAS}}: tensor {BIAS} has -inf at [0]"]),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_what_scales_and_biases_tell_is_refused(folder, case):
    breaks, parts = BAD_VALUES[case]
    parts = filled(parts, folder)
    breaks(folder)
    for function in (import_checkpoint, export_checkpoint):
        message = refusal(function, folder.path, folder.path.with_name("out"))
        for part in parts:
            assert part in message, message
        assert nothing_written(folder)


def test_an_absent_mtp_module_is_a_note(folder):
    for name in folder.mtp():
        folder.put(name, None)
    inventory = take_inventory(open_directory(folder.path))
    assert inventory.model.mtp_depth == 0
    (note,) = inventory.notes
    assert "config.json names 1 MTP layers, but no tensor of layer 3 is there" in note
    import_checkpoint(folder.path, out := folder.path.with_name("out"))
    assert open_checkpoint(out).config.model.mtp_depth == 0


@pytest.mark.parametrize("shape", [(), (5,), (8, 12, 132), (7, 24, 132)])
def test_fused_experts_of_a_wrong_shape_are_named_once(tiny_model, tmp_path, shape):
    fabricate(tmp_path / "in", tiny_model(), dtype="bf16", fused=True)
    file, name = tmp_path / "in" / "model.safetensors", "model.layers.1.mlp.experts.gate_up_proj"
    save_file(load_file(file) | {name: torch.ones(shape, dtype=torch.bfloat16)}, file)
    inventory = take_inventory(open_directory(tmp_path / "in"))
    assert inventory.wrong == [f"{file}: tensor {name} has shape {list(shape)}, not [8, 24, 36]"]
    assert (inventory.missing, inventory.left_over) == ([], [])
    assert inventory.wrong[0] in refusal(import_checkpoint, tmp_path / "in", tmp_path / "out")


def test_code_is_neither_run_nor_copied(folder):
    ran = folder.path / "ran"
    for name in ("modeling_evil.py", "configuration_evil.py", "LICENSE-evil.py", "conftest.py"):
        (folder.path / name).write_text(f"open({str(ran)!r}, 'w')")
    (folder.path / "LICENSE-CODE").write_text("text")
    (folder.path / "pytorch_model.bin.index.json").write_text("{}")
    torch.save({}, folder.path / "optimizer.pt")
    folder.config(auto_map={"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"})
    imported, exported = folder.path.with_name("imported"), folder.path.with_name("exported")
    import_checkpoint(folder.path, imported)
    export_checkpoint(imported, exported)
    export_checkpoint(folder.path, folder.path.with_name("again"))
    assert not ran.exists() and not any("evil" in name for name in sys.modules)
    for out in (imported, exported, folder.path.with_name("again")):
        kinds = {file.suffix for file in out.rglob("*") if file.is_file()}
        assert not kinds & {".py", ".pt", ".bin"}
        assert not (out / "pytorch_model.bin.index.json").exists()
        assert out == imported or (out / "LICENSE-CODE").read_text() == "text"
        assert "auto_map" not in (json.loads((out / "config.json").read_text()) if out != imported else {})


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "evil.py", "config.json", ""])
def test_an_imported_checkpoint_writes_no_file_but_its_texts(imported, name):
    out = imported.with_name("out")
    record = imported / "hugging_face" / "hugging_face.json"
    changed = json.loads(record.read_text())
    changed["files"][name] = "text"
    record.write_text(json.dumps(changed))
    assert refusal(export_checkpoint, imported, out).startswith(f"{imported}: hugging_face.json has {name!r}")
    assert [path.name for path in imported.parent.iterdir()] == ["imported"]


@pytest.mark.parametrize("lost", [None, 1, 10**9])
def test_a_damaged_import_is_refused_where_it_is_read(imported, lost):
    out = imported.with_name("out")
    name = "parameters.moe_blocks.feed_forward.experts.down"
    chunk = next(file for file in (imported / "state" / name / "c").rglob("*") if file.is_file())
    if lost is None:
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:-lost])
    for function in (export_checkpoint, lambda source, out: open_model(source).read(shapes_of(source))):
        assert f"/{name}/" in refusal(function, imported, out)
    assert not out.exists()


def shapes_of(source: Path) -> dict[str, Any]:
    parameters, router_bias = abstract_trees(skeleton_of(open_checkpoint(source).config.model))
    return {"parameters": parameters, "router_bias": router_bias}


def test_a_damaged_record_of_the_import_is_named(imported):
    (imported / "hugging_face" / "hugging_face.json").write_text('{"files": ')
    with pytest.raises(CheckpointError, match="hugging_face.json is damaged"):
        open_model(imported)


def test_weights_that_the_index_does_not_name_are_told(folder):
    (folder.path / "consolidated.safetensors").write_bytes(b"")
    _, inventory = opened_inventory(folder.path)
    assert [note for note in inventory.notes if "consolidated.safetensors is passed over" in note]
    assert not inventory.missing and not inventory.left_over
