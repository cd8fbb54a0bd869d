"""A workdir is resumed by its own run and refused to every other."""

import dataclasses
from typing import Any

import pytest

from configs.tiny import config as tiny
from dsv3_jax.config import Config
from dsv3_jax.training.checkpoint import CheckpointError
from dsv3_jax.training.resume import (
    FREE_ON_INIT,
    FREE_ON_RESUME,
    OtherRunError,
    read_config,
    refuse_other_model,
    refuse_other_run,
    write_config,
)


def _names() -> list[str]:
    names = []
    for section in dataclasses.fields(Config):
        value = getattr(tiny, section.name)
        inner = (
            [f"{section.name}.{field.name}" for field in dataclasses.fields(value)] if section.name != "seed" else []
        )
        names += inner or [section.name]
    return names


def _changed(name: str, new: Any) -> Config:
    section, dot, field = name.partition(".")
    if not dot:
        return dataclasses.replace(tiny, **{section: new})
    return dataclasses.replace(tiny, **{section: dataclasses.replace(getattr(tiny, section), **{field: new})})


@pytest.mark.parametrize("name", _names())
def test_every_field_is_free_or_refused_by_name(name, tmp_path):
    other = _changed(name, "something else")
    if name in FREE_ON_RESUME:
        refuse_other_run(tiny, other, tmp_path)
    else:
        with pytest.raises(OtherRunError, match=f"^{name}: the run in {tmp_path} has .*'something else'") as caught:
            refuse_other_run(tiny, other, tmp_path)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    if not name.startswith("model.") or name in FREE_ON_INIT:
        refuse_other_model(tiny, other, tmp_path)
    else:
        with pytest.raises(OtherRunError, match=f"^{name}: the model in"):
            refuse_other_model(tiny, other, tmp_path)


def test_free_fields_exist():
    assert FREE_ON_RESUME | FREE_ON_INIT <= set(_names())
    assert {"model.width", "training.tokens", "seed", "data.path"}.isdisjoint(FREE_ON_RESUME)


def test_a_changed_width_names_both_values(tmp_path):
    with pytest.raises(OtherRunError, match="model.width: .* has 96, this command 32; .*another --workdir"):
        refuse_other_run(_changed("model.width", 96), _changed("model.width", 32), tmp_path)


def test_the_workdir_keeps_the_configuration(tmp_path):
    assert read_config(tmp_path) is None
    write_config(tmp_path / "run", tiny)
    assert read_config(tmp_path / "run") == tiny
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: not a saved configuration"):
        read_config(tmp_path / "run")
