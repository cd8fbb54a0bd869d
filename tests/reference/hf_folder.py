"""A fabricated Hugging Face directory, to break in one way or another."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_jax.errors import UserError

INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.experts.5.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
ROUTER = "model.layers.2.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
QUERY_NORM = "model.layers.1.self_attn.q_a_layernorm.weight"


class Folder:
    """One of several files."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def weight_map(self) -> dict[str, str]:
        return json.loads((self.path / INDEX).read_text())["weight_map"]

    def file(self, name: str) -> Path:
        return self.path / self.weight_map[name]

    def tensor(self, name: str) -> torch.Tensor:
        return load_file(self.file(name))[name]

    def put(self, name: str, tensor: torch.Tensor | None, file: Path | None = None) -> None:
        """A tensor in place of the one of this name, or none."""
        file, weight_map = file or self.file(name), self.weight_map
        tensors = load_file(file) | {name: tensor}
        save_file({key: value for key, value in tensors.items() if value is not None}, file)
        others = {key: value for key, value in weight_map.items() if key != name}
        self.index(others if tensor is None else others | {name: file.name})

    def index(self, weight_map: dict[str, Any]) -> None:
        (self.path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def config(self, **changes: Any) -> None:
        config = json.loads((self.path / "config.json").read_text())
        (self.path / "config.json").write_text(json.dumps(config | changes))

    def header(self, name: str, **changes: Any) -> None:
        """What the header says of a tensor, its length and the bytes after it kept."""
        file = self.file(name)
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header[name] |= changes
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    def offsets(self, name: str, shift: int) -> None:
        length = int.from_bytes(self.file(name).read_bytes()[:8], "little")
        begin, end = json.loads(self.file(name).read_bytes()[8 : 8 + length])[name]["data_offsets"]
        self.header(name, data_offsets=[begin + shift, end + shift])

    def mtp(self) -> list[str]:
        return [name for name in self.weight_map if name.startswith("model.layers.3.")]


def refusal(function: Callable[..., object], *arguments: Path) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 1000
    assert caught.value.exit_code == 1
    return message


def nothing_written(folder: Folder) -> bool:
    return [path.name for path in folder.path.parent.iterdir()] == [folder.path.name]


def filled(parts: list[str], folder: Folder) -> list[str]:
    named = {"UP": UP, "DOWN": DOWN, "ROUTER": ROUTER, "BIAS": BIAS, "HEAD": "lm_head.weight"}
    files = {key: folder.file(name) for key, name in named.items()}
    names = {f"{key}_NAME": file.name for key, file in files.items()}
    return [part.format(**files, **names, path=folder.path) for part in parts]
