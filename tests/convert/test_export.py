"""What is exported: transformers computes with it what we do, and each type loses what its definition says."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import dsv3_jax
from dsv3_jax.convert import sources
from dsv3_jax.convert.exporting import export_checkpoint
from dsv3_jax.convert.importing import import_checkpoint
from dsv3_jax.convert.opening import fine_tuning_config
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.functional import abstract_trees, skeleton_of
from dsv3_jax.training import checkpoint
from dsv3_jax.training.checkpoint import Checkpoints
from tests.convert.test_round_trip import FORMS, UNEVEN, V2, bits, read_back, require_same
from tests.reference.hf_checkpoint import dequantize, fabricate, tensor_shapes

TOKENIZER = train_tokenizer(["naïve text of some words " * 50], 400).to_str()
TOLERANCE = 2e-5


@pytest.fixture
def trained(tmp_path, tiny_model):
    """`trained(**changes)`: a workdir with a checkpoint as train.py writes it, parameters and biases random."""

    def make(**changes) -> Path:
        config = fine_tuning_config(tiny_model(vocabulary=400, **changes))
        random = np.random.default_rng(0)

        def draw(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            mean = 1.0 if "gain" in jax.tree_util.keystr(path) else 0.0
            return jnp.asarray(random.normal(mean, 0.2, leaf.shape), leaf.dtype)

        parameters, router_bias = jax.tree_util.tree_map_with_path(draw, abstract_trees(skeleton_of(config.model)))
        checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", config, TOKENIZER)
        checkpoints.save(7, {"parameters": parameters, "router_bias": router_bias, "step": jnp.int32(7)}, {})
        checkpoints.close()
        return tmp_path / "run"

    return make


V2_SHAPE = {**V2, "routed_scale": 4.0}
MODELS = {
    "V3": {},
    "V3, YaRN": {"yarn_factor": 40.0, "yarn_mscale": 1.0, "rope_head_dim": 16},
    "V3, no query latent, one group": {"query_latent": None, "expert_groups": 1, "groups_per_token": 1},
    "V3 without selection bias": {"selection_bias": False},
    "V2": V2_SHAPE,
    "V2-Lite, YaRN": {
        **V2_SHAPE,
        "query_latent": None,
        "expert_groups": 1,
        "groups_per_token": 1,
        "yarn_factor": 40.0,
        "yarn_mscale": 0.707,
        "yarn_mscale_all_dim": 0.707,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_logits(tmp_path, trained, name):
    run = trained(**MODELS[name])
    export_checkpoint(run, tmp_path / "out", dtype="f32")
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["mismatched_keys"]
    # transformers passes over layer 61 alone; of other sizes it lists the MTP layer as not expected.
    assert all(key.startswith("model.layers.3.") for key in told["unexpected_keys"])
    tokens = np.random.default_rng(1).integers(0, 400, (2, 40))
    with torch.no_grad():
        wanted = theirs.to(torch.float32).eval()(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(dsv3_jax.load(run)[0](tokens.astype(np.int32)))
    assert np.abs(ours - wanted).max() < TOLERANCE * wanted.std()
    back = np.asarray(dsv3_jax.load(tmp_path / "out")[0](tokens.astype(np.int32)))
    np.testing.assert_array_equal(back, ours)


def test_a_directory_that_transformers_saved_is_read(tmp_path, trained):
    run = trained()
    export_checkpoint(run, tmp_path / "out", dtype="f32")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    model, config, _ = dsv3_jax.load(tmp_path / "theirs")
    assert config.model.mtp_depth == 0  # transformers leaves the MTP layer out, whatever its config.json says
    tokens = np.arange(30, dtype=np.int32)[None]
    np.testing.assert_array_equal(model(tokens), dsv3_jax.load(run)[0](tokens))


def test_the_tokenizer_is_read_as_it_is_and_names_its_special_tokens(tmp_path, trained):
    """TRAP C6: transformers' own class for DeepSeek would rebuild the pre-tokenizer."""
    export_checkpoint(trained(), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "naïve  text\n\n  of 12345 words.join(x)"
    ours = dsv3_jax.load(tmp_path / "out")[2]
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "out" / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (0, 1)


def test_released_names_with_the_copies_of_the_mtp_layer(tmp_path, trained, tiny_model):
    run = trained()
    export_checkpoint(run, tmp_path / "out")
    tensors = read_back(tmp_path / "out")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == tensor_shapes(tiny_model(vocabulary=400))
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        assert bits(tensors[f"model.layers.3.{copy}.weight"]) == bits(tensors[f"{original}.weight"])
    export_checkpoint(run, tmp_path / "without", mtp=False)
    require_same(
        read_back(tmp_path / "without"), {name: t for name, t in tensors.items() if "model.layers.3." not in name}
    )
    assert json.loads((tmp_path / "without" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("form", ["fp8, edge blocks", "fp8, E8M0 scales"])
def test_fp8_to_bf16_is_the_product_rounded_once(tmp_path, tiny_model, form):
    """Straight from one directory to another, as from a checkpoint (TRAP C2: without a GPU)."""
    changes, options = FORMS[form]
    tensors = fabricate(tmp_path / "there", tiny_model(**changes), **options)
    wanted = {
        name: tensor if name.endswith("bias") else tensor.to(torch.bfloat16)
        for name, tensor in dequantize(tensors).items()
    }
    import_checkpoint(tmp_path / "there", tmp_path / "ours")
    for source in ("there", "ours"):
        export_checkpoint(tmp_path / source, tmp_path / f"from-{source}", dtype="bf16")
        require_same(read_back(tmp_path / f"from-{source}"), wanted)
        assert "quantization_config" not in json.loads((tmp_path / f"from-{source}" / "config.json").read_text())


@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
def test_what_a_lossy_type_loses(tmp_path, tiny_model, scale_format):
    """Half a step of the type: 2^-8 of a value in bfloat16, 2^-4 in FP8 or half of its smallest step, scaled."""
    tensors = fabricate(tmp_path / "there", tiny_model(**UNEVEN), dtype="f32")
    export_checkpoint(tmp_path / "there", tmp_path / "bf16", dtype="bf16")
    export_checkpoint(tmp_path / "there", tmp_path / "fp8", dtype="fp8", scale_format=scale_format)
    for name, tensor in read_back(tmp_path / "bf16").items():
        assert ((tensor.float() - tensors[name]).abs() <= 2**-8 * tensors[name].abs()).all(), name
    stored = read_back(tmp_path / "fp8")
    require_near(stored, tensors)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config.get("scale_fmt") == scale_format
    if scale_format:
        require_powers_of_two(stored)


def test_quantising_what_was_fp8_gives_it_back(tmp_path, tiny_model):
    """Stored scales are kept where they are of the format asked for, and only then."""
    tensors = fabricate(tmp_path / "there", tiny_model(**UNEVEN), dtype="fp8")
    export_checkpoint(tmp_path / "there", tmp_path / "same", dtype="fp8", scale_format="float32")
    require_same(read_back(tmp_path / "same"), tensors)
    export_checkpoint(tmp_path / "there", tmp_path / "powers", dtype="fp8", scale_format="ue8m0")
    require_powers_of_two(read_back(tmp_path / "powers"))
    require_near(read_back(tmp_path / "powers"), dequantize(tensors))


def require_near(stored: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in dequantize(stored).items():
        error, size = (tensor - wanted[name]).abs(), wanted[name].abs()
        if f"{name}_scale_inv" not in stored:
            assert (error <= 2**-8 * size).all(), name
            continue
        scales = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        half_a_step = torch.maximum(size * 2**-4, scales[: size.shape[0], : size.shape[1]] * 2**-10)
        assert (error <= half_a_step * 1.0001).all(), name


def require_powers_of_two(stored: dict[str, torch.Tensor]) -> None:
    scales = [tensor for name, tensor in stored.items() if name.endswith("_scale_inv")]
    assert scales and all((torch.frexp(scale)[0] == 0.5).all() for scale in scales)


def test_a_large_array_of_a_trained_checkpoint_is_read_in_parts(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2000)
    run = trained()
    metadata = sources.saved_tensors(
        run / "checkpoints" / "7" / "state", dsv3_jax.load(run)[1].model, sources.StoredForm()
    )
    experts = metadata._arrays["parameters.moe_blocks.feed_forward.experts.gate_up"]
    assert experts.chunk_layout.read_chunk.shape[:2] == (1, 1)
    export_checkpoint(run, tmp_path / "out")
    model, again = dsv3_jax.load(run)[0], dsv3_jax.load(tmp_path / "out")[0]
    tokens = np.arange(30, dtype=np.int32)[None]
    np.testing.assert_array_equal(model(tokens), again(tokens))
