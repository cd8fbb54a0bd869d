"""Every tensor of DeepSeek-V3's released files: name, type, shape and the number of the file that holds it."""

import itertools
from pathlib import Path

# Two parts with an empty line between them. First a line `name dtype 128x256 0-61 0-255` for all tensors of one kind,
# where each # in the name stands for a number of the range in its place. Then `file*count` for runs of tensors in the
# order of their names with numbers taken as numbers.
MAP = Path(__file__).parents[1] / "convert" / "deepseek_v3_tensors.txt"

Released = tuple[str, str, list[int], int]


def load() -> list[Released]:
    """(name, safetensors dtype, shape, file number from 1 to 163) of all 91,991 tensors, by name."""
    kinds, runs = MAP.read_text().split("\n\n")
    tensors = [tensor for kind in kinds.split("\n") for tensor in _of_kind(kind)]
    tensors.sort(key=lambda tensor: _order(tensor[0]))
    files = [int(file) for file, count in (run.split("*") for run in runs.split()) for _ in range(int(count))]
    return sorted((*tensor, file) for tensor, file in zip(tensors, files, strict=True))


def _of_kind(line: str) -> list[tuple[str, str, list[int]]]:
    name, dtype, shape, *ranges = line.split(" ")
    bounds = [[int(bound) for bound in span.split("-")] for span in ranges]
    numbers = itertools.product(*(range(low, high + 1) for low, high in bounds))
    sizes = [int(size) for size in shape.split("x")]
    return [(name.replace("#", "{}").format(*chosen), dtype, sizes) for chosen in numbers]


def _order(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
