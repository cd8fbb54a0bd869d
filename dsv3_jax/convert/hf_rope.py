"""Rotary positions and YaRN in `config.json`: `rope_theta`, `rope_scaling`, and transformers 5's `rope_parameters`."""

from pathlib import Path
from typing import Any

from dsv3_jax.convert.hf_fields import Fields, HuggingFaceConfigError
from dsv3_jax.model_config import ModelConfig

_PLAIN_NAMES = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_YARN_NAMES = _PLAIN_NAMES | {
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
}


def rope_fields(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """ModelConfig's rope fields; those of YaRN are absent under plain RoPE.

    A file may carry both spellings as long as they agree: transformers would read `rope_scaling` then.

    Raises:
        HuggingFaceConfigError: a rope type other than default and yarn, or fields that readers understand differently.
    """
    top = Fields(values, path)
    theta = top.number("rope_theta", 10000.0)
    spelled = [name for name in ("rope_scaling", "rope_parameters") if values.get(name)]
    read = [_of_object(top.inner(name), theta) for name in spelled]
    for name, found in zip(spelled, read, strict=True):
        if "rope_theta" in values and found["rope_theta"] != theta:
            raise top.refusal("rope_theta", f"must be {name}.rope_theta={found['rope_theta']}, or go")
        if found != read[0]:
            raise top.refusal(name, "must say the same as rope_scaling, or one of them go")
    return read[0] if read else {"rope_theta": theta}


def hugging_face_rope(model: ModelConfig) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` (null for plain RoPE) and `rope_parameters`.

    Raises:
        HuggingFaceConfigError: a scale coefficient that readers understand differently.
    """
    theta = _short(model.rope_theta)
    if model.yarn_factor == 1.0:
        plain = {"rope_type": "default", "rope_theta": theta}
        return {"rope_theta": theta, "rope_scaling": None, "rope_parameters": plain}
    if not _understood(model.yarn_mscale, model.yarn_mscale_all_dim):
        raise HuggingFaceConfigError(
            f"model.yarn_mscale={model.yarn_mscale} with model.yarn_mscale_all_dim={model.yarn_mscale_all_dim} means "
            "different things to different readers of config.json: both must be above 0, or 1 and 0"
        )
    yarn = {
        "factor": _short(model.yarn_factor),
        "original_max_position_embeddings": model.yarn_original_length,
        "beta_fast": _short(model.yarn_beta_fast),
        "beta_slow": _short(model.yarn_beta_slow),
        "mscale": model.yarn_mscale,
        "mscale_all_dim": model.yarn_mscale_all_dim,
    }
    return {
        "rope_theta": theta,
        "rope_scaling": {"type": "yarn", **yarn},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": theta, **yarn},
    }


def _of_object(rope: Fields, theta: float) -> dict[str, Any]:
    kinds = [rope.choice(name, ("default", "yarn")) for name in ("rope_type", "type") if name in rope.values]
    if len(set(kinds)) > 1:
        raise rope.refusal("type", f"must be rope_type={kinds[0]!r}, or go")
    yarn = kinds[:1] == ["yarn"]
    known = _YARN_NAMES if yarn else _PLAIN_NAMES
    for name, value in rope.values.items():
        if name not in known and value is not None:
            raise rope.refusal(name, f"is not a field of rope type '{'yarn' if yarn else 'default'}' here: it must go")
    for name in ("truncate", "partial_rotary_factor"):
        if rope.values.get(name) not in (None, True, 1.0):
            raise rope.refusal(name, "must go: this model has only the usual YaRN range, and rotates all rope dims")
    found: dict[str, Any] = {"rope_theta": rope.number("rope_theta", theta)}
    if not yarn:
        return found
    for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
        if name in rope.values and rope.number(name) <= 0:
            raise rope.refusal(name, "must be above 0")
    mscale, mscale_all_dim = _coefficients(rope)
    return found | {
        "yarn_factor": rope.number("factor"),
        "yarn_original_length": rope.integer("original_max_position_embeddings"),
        "yarn_beta_fast": rope.number("beta_fast", 32.0),
        "yarn_beta_slow": rope.number("beta_slow", 1.0),
        "yarn_mscale": mscale,
        "yarn_mscale_all_dim": mscale_all_dim,
    }


def _coefficients(rope: Fields) -> tuple[float, float]:
    """mscale and mscale_all_dim, 1 and 0 where both are absent: no factor on the logit, the plain one on cos and sin.

    With only one of them, DeepSeek's code takes the ratio with those defaults, transformers ignores the one given
    where it scales cos and sin.
    """
    mscale, mscale_all_dim = rope.number("mscale", 1.0), rope.number("mscale_all_dim", 0.0)
    for name, other in (("mscale", "mscale_all_dim"), ("mscale_all_dim", "mscale")):
        alone = other not in rope.values and (mscale, mscale_all_dim) != (1.0, 0.0)
        if name in rope.values and (alone or not _understood(mscale, mscale_all_dim)):
            raise rope.refusal(name, f"must come with {other}, both above 0")
    return mscale, mscale_all_dim


def _understood(mscale: float, mscale_all_dim: float) -> bool:
    return (mscale > 0.0 and mscale_all_dim > 0.0) or (mscale, mscale_all_dim) == (1.0, 0.0)


def _short(value: float) -> float:
    """40 for 40.0, as released files have it."""
    return int(value) if float(value).is_integer() else value
