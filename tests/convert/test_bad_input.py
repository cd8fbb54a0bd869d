"""Directories broken in one way each: refused in one line that names it, before anything is written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_jax.convert.directory import INDEX
from dsv3_jax.convert.exporting import export_checkpoint
from dsv3_jax.convert.importing import import_checkpoint
from dsv3_jax.convert.inspecting import inspect
from dsv3_jax.errors import UserError
from tests.reference.hf_checkpoint import fabricate
from tests.reference.hf_folder import DOWN, QUERY_NORM, ROUTER, UP, Folder, filled, nothing_written, refusal


@pytest.fixture(scope="module")
def good(tiny_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good")
    fabricate(path, tiny_model(width=132, dense_ffn_width=260), dtype="fp8", shards=3)
    return path


@pytest.fixture
def folder(good, tmp_path) -> Folder:
    shutil.copytree(good, tmp_path / "in")
    return Folder(tmp_path / "in")


def _remove_mtp_norm(folder: Folder) -> None:
    folder.put("model.layers.3.enorm.weight", None)


def _twice(folder: Folder) -> None:
    other = folder.file("lm_head.weight")
    save_file(load_file(other) | {DOWN: folder.tensor(DOWN)}, other)


def _elsewhere(folder: Folder) -> None:
    folder.index(folder.weight_map | {DOWN: folder.file("lm_head.weight").name})


def _nested(folder: Folder) -> None:
    (folder.path / "sub").mkdir()
    moved = folder.file("lm_head.weight").rename(folder.path / "sub" / "weights.safetensors")
    of_file = {name for name, file in folder.weight_map.items() if file == folder.file("lm_head.weight").name}
    folder.index(folder.weight_map | dict.fromkeys(of_file, f"sub/{moved.name}"))


def _cut(folder: Folder) -> None:
    content = folder.file(DOWN).read_bytes()
    folder.file(DOWN).write_bytes(content[:-100])


def _pickles(folder: Folder) -> None:
    for file in folder.path.glob("*.safetensors*"):
        file.unlink()
    torch.save({"lm_head.weight": torch.ones(3)}, folder.path / "pytorch_model-00001-of-00002.bin")


def _named_pickle(folder: Folder) -> None:
    torch.save({"lm_head.weight": torch.ones(3)}, folder.file("lm_head.weight"))


def _named_bin(folder: Folder) -> None:
    (folder.path / "model.bin").write_bytes(b"\x80\x02")
    folder.index(folder.weight_map | {"lm_head.weight": "model.bin"})


# The broken folder, and what the line must hold; {NAME} is the file that the good folder has a tensor in.
BROKEN: dict[str, tuple[Callable[[Folder], object], list[str]]] = {
    "missing file": (lambda folder: folder.file(DOWN).unlink(), ["{DOWN} is missing", "names 3 files"]),
    "no files": (
        lambda folder: [file.unlink() for file in folder.path.glob("*.safetensors*")],
        ["{path} has no *.safetensors file"],
    ),
    "cut file": (_cut, ["{DOWN}: 100 of ", "bytes are missing: the file is cut short"]),
    "bytes too many": (
        lambda folder: folder.file(DOWN).write_bytes(folder.file(DOWN).read_bytes() + b"more"),
        ["{DOWN}: 4 bytes after tensor ", " are in no tensor"],
    ),
    "overlapping": (
        lambda folder: folder.offsets(DOWN, -2),
        ["{DOWN}: tensor '" + DOWN + "' overlaps tensor '", "2 bytes"],
    ),
    # Another tensor is the last now, and the bytes that this one had are missed first.
    "out of range": (
        lambda folder: folder.offsets(DOWN, 10**9),
        ["{DOWN}: 34320 bytes between tensor ", " are in no tensor"],
    ),
    "offsets and shape": (
        lambda folder: folder.header(DOWN, shape=[132, 261]),
        ["{DOWN}: tensor '" + DOWN + "' has 34320 bytes, need 34452 for F8_E4M3 [132, 261]"],
    ),
    "unknown type": (lambda folder: folder.header(DOWN, dtype="F4"), ["{DOWN}: tensor '" + DOWN + "' has dtype 'F4'"]),
    "in two files": (_twice, [f"tensor {DOWN} is in both", "{DOWN}", "{HEAD}", "remove one"]),
    "index: elsewhere": (_elsewhere, [INDEX, f"{{HEAD_NAME}} has tensor {DOWN}, but it is in {{DOWN_NAME}}"]),
    "index: in no file": (
        lambda folder: folder.index(folder.weight_map | {"more": folder.file(DOWN).name}),
        [INDEX, "{DOWN_NAME} has tensor more, but no file has it"],
    ),
    "index: not named": (
        lambda folder: folder.index({name: file for name, file in folder.weight_map.items() if name != DOWN}),
        [f"{{DOWN}} has tensor {DOWN}, which {INDEX} does not name"],
    ),
    "index: a path": (_nested, [INDEX, "'sub/weights.safetensors' must be a *.safetensors in the same folder"]),
    "index: above": (
        lambda folder: folder.index(folder.weight_map | {DOWN: "../x.safetensors"}),
        [INDEX, "'../x.safetensors' must be a *.safetensors in the same folder"],
    ),
    "index: a pickle": (_named_bin, ["model.bin is a pickle", "never opened", "save_pretrained"]),
    "index: numbers": (lambda folder: folder.index({DOWN: 1}), [INDEX, "must give a file name for every tensor"]),
    "index: no JSON": (lambda folder: (folder.path / INDEX).write_text("{"), [INDEX, "is not an index"]),
    "index: deep": (lambda folder: (folder.path / INDEX).write_text("[" * 10**5), [INDEX, "is not an index"]),
    "index: a list": (lambda folder: (folder.path / INDEX).write_text("[]"), [INDEX, "is not an index"]),
    "pickles": (
        _pickles,
        ["pytorch_model-00001-of-00002.bin is a pickle", "can run any code", "never opened", "save_pretrained"],
    ),
    "pickle by another name": (_named_pickle, ["{HEAD}", "pickle", "never opened"]),
    "missing tensor": (lambda folder: folder.put(UP, None), ["1 tensors are missing, the first " + UP]),
    "unexpected tensor": (
        lambda folder: folder.put("model.layers.1.more.weight", torch.ones(2), folder.file(DOWN)),
        ["1 tensors are not of this model, the first model.layers.1.more.weight in {DOWN}"],
    ),
    "missing scale": (lambda folder: folder.put(UP + "_scale_inv", None), [f"missing, the first {UP}_scale_inv"]),
    "scale without weight": (
        lambda folder: folder.put(QUERY_NORM + "_scale_inv", torch.ones(1, 1), folder.file(QUERY_NORM)),
        [f"not of this model, the first {QUERY_NORM}_scale_inv"],
    ),
    "shape": (
        lambda folder: folder.put(ROUTER, folder.tensor(ROUTER).T.contiguous()),
        [f"{{ROUTER}}: tensor {ROUTER} has shape [132, 8], not [8, 132]"],
    ),
    "dims": (
        lambda folder: folder.put(QUERY_NORM, torch.ones(12, 1)),
        [f"tensor {QUERY_NORM} has shape [12, 1], not [12]"],
    ),
    "scale of 116 rows": (
        lambda folder: folder.put(DOWN + "_scale_inv", torch.ones(132 // 44, 3)),
        [f"{{DOWN}}: tensor {DOWN}_scale_inv has shape [3, 3], not [2, 3]: 128 x 128 blocks"],
    ),
    "type": (
        lambda folder: folder.put(ROUTER, torch.ones(8, 132, dtype=torch.int8)),
        [f"{{ROUTER}}: tensor {ROUTER} has type I8, which must be one of F32, BF16, F16"],
    ),
    "other float8": (
        lambda folder: folder.put(DOWN, folder.tensor(DOWN).to(torch.float8_e5m2)),
        [f"tensor {DOWN} has type F8_E5M2"],
    ),
    "float8 router": (
        lambda folder: folder.put(ROUTER, folder.tensor(ROUTER).to(torch.float8_e4m3fn)),
        [f"{{ROUTER}}: tensor {ROUTER} is in FP8, which only matrices of attention and experts may be"],
    ),
    "type of a scale": (
        lambda folder: folder.put(DOWN + "_scale_inv", torch.ones(2, 3, dtype=torch.bfloat16)),
        [f"tensor {DOWN}_scale_inv has type BF16, which must be one of F32, F8_E8M0"],
    ),
    "scales of two types": (
        lambda folder: folder.put(DOWN + "_scale_inv", torch.ones(2, 3).to(torch.float8_e8m0fnu)),
        ["_scale_inv has type ", "other scales have "],
    ),
    "MTP in part": (_remove_mtp_norm, ["1 tensors are missing, the first model.layers.3.enorm.weight"]),
    "shape of a MTP copy": (
        lambda folder: folder.put("model.layers.3.embed_tokens.weight", torch.ones(47, 132, dtype=torch.bfloat16)),
        ["tensor model.layers.3.embed_tokens.weight must have shape and type of model.embed_tokens.weight"],
    ),
    "fewer layers": (lambda folder: folder.config(num_hidden_layers=2), ["config.json", "are not of this model"]),
    "more layers": (
        lambda folder: folder.config(num_hidden_layers=5),
        ["config.json", "are missing", "model.layers.4."],
    ),
    "billions of layers": (lambda folder: folder.config(num_hidden_layers=10**9), ["1,000,000,000 layers"]),
    "billions of MTP layers": (lambda folder: folder.config(num_nextn_predict_layers=10**9), ["layers", "MTP"]),
    "billions of experts": (lambda folder: folder.config(n_routed_experts=8 * 10**9), ["8,000,000,000 experts"]),
    "no config": (lambda folder: (folder.path / "config.json").unlink(), ["config.json: cannot be read"]),
    "config: no JSON": (lambda folder: (folder.path / "config.json").write_text("{'a'"), ["config.json: is not JSON"]),
    "config: deep": (
        lambda folder: (folder.path / "config.json").write_text("[" * 10**5),
        ["config.json: is not JSON"],
    ),
    "config: another model": (
        lambda folder: folder.config(architectures=["LlamaForCausalLM"], model_type="llama"),
        ['config.json: architectures=["LlamaForCausalLM"] is not a DeepSeek-V2/V3 model'],
    ),
    "unknown quantisation": (
        lambda folder: folder.config(quantization_config={"quant_method": "awq", "bits": 4}),
        ['config.json: quantization_config.quant_method="awq" is an unknown quantisation: must be "fp8"'],
    ),
    "blocks of another size": (
        lambda folder: folder.config(
            quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}
        ),
        ["weight_block_size=[64, 64]", "must be [128, 128]"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_headers_tell_is_refused(folder, case):
    breaks, parts = BROKEN[case]
    parts = filled(parts, folder)
    breaks(folder)
    out = folder.path.with_name("out")
    message = refusal(import_checkpoint, folder.path, out)
    for part in parts:
        assert part in message, message
    assert nothing_written(folder)
    refusal(export_checkpoint, folder.path, out)
    assert nothing_written(folder)
    try:
        report, whole = inspect(folder.path, 1)
    except UserError as error:
        assert str(error) == message
    else:
        assert not whole and report.isprintable() is False
