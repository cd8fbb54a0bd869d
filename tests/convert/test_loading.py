"""A Hugging Face directory or imported checkpoint as the start of a run, on one device and on a mesh."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.torch import save_file

import dsv3_jax
import infer
import train
from dsv3_jax.command_line import parse_train
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.importing import import_checkpoint
from dsv3_jax.convert.inventory import opened_inventory
from dsv3_jax.convert.opening import fine_tuning_config, open_model
from dsv3_jax.convert.parameters import read_parameters
from dsv3_jax.convert.safetensors_file import SafetensorsReader
from dsv3_jax.convert.sources import DirectoryTensors
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.inference.arguments import parse_infer
from dsv3_jax.inference.placement import ROWS, over
from dsv3_jax.inference.weights import ready_to_decode
from dsv3_jax.model.functional import abstract_trees, parameter_specs, skeleton_of
from dsv3_jax.training.checkpoint import open_checkpoint
from dsv3_jax.training.metrics import read_metrics
from sharding.collectives import joined
from sharding.mesh import LayoutError, shardings
from sharding.rules import TENSOR_AXES
from tests.convert.test_round_trip import FORMS, UNEVEN
from tests.reference.hf_checkpoint import dequantize, fabricate

ROOT = Path(train.__file__).parent
# A row is some pages long: what is read of one is not rounded up to all of it.
WIDE = {"width": 8192, "layers": 2, "mtp_depth": 0, "vocabulary": 64, "query_latent": 16}


def placed_trees(model, mesh) -> dict:
    skeleton = skeleton_of(model)
    trees = dict(zip(("parameters", "router_bias"), abstract_trees(skeleton), strict=True))
    places = dict(zip(("parameters", "router_bias"), shardings(mesh, parameter_specs(skeleton, mesh)), strict=True))
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), trees, places)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 4}, {"tensor": 2, "node": 2, "expert": 2}, {"data": 8}])
@pytest.mark.parametrize("form", ["fp8", "fused experts"])
def test_on_a_mesh_as_on_one_device(tmp_path, tiny_model, mesh_with, form, sizes):
    changes = {**UNEVEN, "heads": 4, "vocabulary": 64, "query_latent": 152}
    model = tiny_model(**changes)
    fabricate(tmp_path / "there", model, **({"dtype": "fp8"} if form == "fp8" else FORMS[form][1]))
    opened = open_model(tmp_path / "there")
    whole = opened.read(dict(zip(("parameters", "router_bias"), abstract_trees(skeleton_of(model)), strict=True)))
    wanted = placed_trees(model, mesh_with(**sizes))
    found = opened.read(wanted)
    for (path, leaf), want, alone in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), jax.tree.leaves(whole), strict=True
    ):
        assert leaf.sharding == want.sharding, path
        np.testing.assert_array_equal(leaf, alone, err_msg=str(path))


def test_copies_of_the_model_share_one_reading(tmp_path, tiny_model, mesh_with):
    model = tiny_model()
    tensors = fabricate(tmp_path, model, mtp_copies=False)
    _, inventory = opened_inventory(tmp_path)
    with SafetensorsReader() as reader:
        read_parameters(DirectoryTensors(inventory, reader), placed_trees(model, mesh_with(data=8)))
        assert reader.bytes_read == sum(tensor.nbytes for tensor in tensors.values())


def test_each_process_reads_only_what_its_devices_hold(tmp_path, tiny_model):
    """Two processes of four devices, fsdp 2 x expert 4: half of every matrix each."""
    tensors = fabricate(tmp_path / "there", tiny_model(**WIDE), shards=2)
    program = """
        import dataclasses, json, sys
        from pathlib import Path
        import jax, numpy as np
        jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
        from dsv3_jax.convert.inventory import opened_inventory
        from dsv3_jax.convert.parameters import read_parameters
        from dsv3_jax.convert.safetensors_file import SafetensorsReader
        from dsv3_jax.convert.sources import DirectoryTensors
        from sharding.mesh import axis_sizes, make_mesh
        from tests.convert.test_loading import placed_trees
        _, inventory = opened_inventory(Path(sys.argv[1]))
        mesh = make_mesh(axis_sizes({"data": 1, "fsdp": 2, "expert": 4}, 8))
        with SafetensorsReader() as reader:
            read = read_parameters(DirectoryTensors(inventory, reader), placed_trees(inventory.model, mesh))
            print(reader.bytes_read)
        down = read["parameters"]["moe_blocks"]["feed_forward"]["experts"]["down"]
        for shard in down.addressable_shards:
            print(json.dumps([[s.start, s.stop] for s in shard.index], default=str), float(np.abs(shard.data).sum()))
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "there"), address, str(index)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=180) for process in processes]
    whole = sum(tensor.nbytes for tensor in tensors.values())
    experts = [tensors[f"model.layers.1.mlp.experts.{e}.down_proj.weight"].float().numpy() for e in range(8)]
    for process, (printed, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
        count, *parts = printed.splitlines()
        # Norms and what has no dim to divide are read by both.
        assert 0.5 * whole < int(count) < 0.52 * whole
        assert len(parts) == 4
        for part in parts:
            bounds, total = re.fullmatch(r"(\[.*\]) (\S+)", part).groups()
            _, (first, last), _, (left, right) = json.loads(bounds)
            wanted = sum(np.abs(matrix[left:right]).sum(dtype=np.float64) for matrix in experts[first:last])
            np.testing.assert_allclose(float(total), wanted, rtol=1e-5)


def test_a_run_begins_with_what_was_imported_and_takes_it_along(tmp_path, tiny_model, texts):
    model = tiny_model(vocabulary=400, layers=1, dense_layers=0, mtp_depth=0)
    tokenizer = train_tokenizer(["return self list range print " * 50], 400).to_str()
    tensors = fabricate(tmp_path / "there", model, dtype="f32", tokenizer=tokenizer)
    import_checkpoint(tmp_path / "there", tmp_path / "ours")
    run = tmp_path / "run"
    options = f"""--config={tmp_path / "there"} --init={tmp_path / "ours"} --workdir={run} --data.path={texts}
        --training.tokens=256 --training.sequence_length=32 --training.batch_size=8 --training.log_interval=1
        --training.sample_tokens=0 --optimizer.learning_rate=1e-30 --loss.bias_speed=0 --data.validation_share=0.3"""
    train.train(parse_train(options.split()), lambda: False)
    assert read_metrics(run / "metrics.jsonl")[0]["loss"] > 0
    saved = open_checkpoint(run)
    assert saved.hugging_face is not None and "tensors" not in saved.hugging_face
    assert json.loads(saved.hugging_face["files"]["tokenizer_config.json"])["add_bos_token"] is True
    # After one step of almost no length.
    head = open_model(run).read({"parameters": {"head": jax.ShapeDtypeStruct((36, 400), np.float32)}})
    np.testing.assert_array_equal(head["parameters"]["head"], tensors["lm_head.weight"].numpy().T)
    assert json.loads((run / "tokenizer.json").read_text()) == json.loads(tokenizer)


def test_text_is_generated_from_a_hugging_face_directory(tmp_path, tiny_model, capsys):
    model = tiny_model(vocabulary=400, layers=1, dense_layers=0, mtp_depth=0)
    tokenizer = train_tokenizer(["return self list range print " * 50], 400).to_str()
    fabricate(tmp_path, model, dtype="fp8", tokenizer=tokenizer)
    options = [f"--checkpoint={tmp_path}", "--prompt=return", "--max_new_tokens=4", "--temperature=0", "--json"]
    told = []
    for weights in ("compute", "float8"):
        infer.infer(parse_infer([*options, f"--weights={weights}"]))
        told.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert len(told[0]) == 4 and told[0] == told[1]


def test_a_configuration_of_a_model_that_came_without_one_is_whole(tiny_model):
    config = fine_tuning_config(tiny_model(maximum_positions=64))
    assert config.training.sequence_length == 64 and config.training.steps == 1000


def test_a_model_divided_over_a_mesh_computes_the_same(tmp_path, tiny_model, mesh_with):
    fabricate(tmp_path, tiny_model(width=48, vocabulary=64, heads=4, query_latent=16), dtype="f32")
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
    alone = dsv3_jax.load(tmp_path)[0](tokens)
    divided = dsv3_jax.load(tmp_path, mesh=mesh_with(fsdp=2, expert=4))[0]
    assert divided.head[...].addressable_shards[0].data.shape == (24, 64)
    np.testing.assert_allclose(divided(tokens), alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(LayoutError, match="mesh.fsdp=5"):
        dsv3_jax.load(tmp_path, mesh=mesh_with(fsdp=5))


def bytes_of(model) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize("scale_dtype", ["f32", "e8m0"])
def test_held_in_fp8_a_model_computes_the_same_in_half_the_memory(tmp_path, tiny_model, mesh_with, scale_dtype):
    """A matrix is the same numbers as in a directory that torch dequantised, so the logits are equal to the last bit,
    in either compute type, on one device and on eight, as loaded and as generation has it."""
    shape = tiny_model(**{**UNEVEN, "heads": 4, "vocabulary": 64, "query_latent": 152})
    tensors = fabricate(tmp_path / "held", shape, dtype="fp8", scale_dtype=scale_dtype)
    fabricate(tmp_path / "plain", shape, dtype="f32", shards=1)
    save_file(dequantize(tensors), tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    tokens_BS = np.arange(32, dtype=np.int32).reshape(4, 8)

    def logits(model, mesh):
        leaves, structure = jax.tree.flatten(model)

        def compute(model, tokens_BS):
            hidden_BSD, _ = model.hidden_states(tokens_BS)
            return joined(model.logits(model.norm(hidden_BSD)), 2, TENSOR_AXES)

        return np.asarray(jax.jit(over(mesh, structure, compute, (ROWS,), ROWS))(leaves, tokens_BS))

    runs = [("bfloat16", None), ("float32", None), ("bfloat16", mesh_with(expert=4, tensor=2))]
    for dtype, mesh in runs if scale_dtype == "f32" else runs[:1]:
        plain = dsv3_jax.load(tmp_path / "plain", mesh=mesh, dtype=dtype)[0]
        held = dsv3_jax.load(tmp_path / "held", mesh=mesh, dtype=dtype, weights="float8")[0]
        found = logits(held, mesh)
        assert np.abs(found).max() > 1
        np.testing.assert_array_equal(found, logits(plain, mesh))
        np.testing.assert_array_equal(*(logits(ready_to_decode(model), mesh) for model in (held, plain)))
        # On the mesh a device's part of these uneven widths ends within a block, and needs more scales.
        if mesh is None and dtype == "bfloat16":
            assert bytes_of(held) < 0.53 * bytes_of(plain)


def test_what_is_not_in_fp8_cannot_be_held_so(tmp_path, tiny_model):
    fabricate(tmp_path, tiny_model(), dtype="bf16")
    with pytest.raises(ConversionError, match=r"model.layers.\d.* is BF16, and weights=float8 holds .* --dtype=fp8"):
        dsv3_jax.load(tmp_path, weights="float8")
