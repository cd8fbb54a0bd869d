"""Typed reading of a Hugging Face `config.json`, with one line of error for whoever has to mend the file."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.errors import UserError

ScaleFormat = Literal["float32", "ue8m0"]

V3, V2 = "DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"
TYPES = {V3: "deepseek_v3", V2: "deepseek_v2"}
"""The model type of each architecture."""

LATENT_NORM_EPSILON = 1e-6
"""Of transformers' latent norms and DeepSeek's, whatever rms_norm_eps says."""

BLOCK = [128, 128]
"""Rows and columns of a weight that share a scale."""

REQUIRED: Any = object()
"""Default of a field that has none."""


class HuggingFaceConfigError(UserError):
    """A `config.json` that is not one of these models, or a model that a `config.json` cannot describe.

    The message names the file, the field, its value and what would be right.
    """


class Fields:
    """One JSON object of a `config.json`, its values checked as they are read.

    Every reader raises HuggingFaceConfigError for a value of another type, and for an absent field without a default.
    """

    def __init__(self, values: dict[str, Any], path: Path, within: str = "") -> None:
        self.values = values
        self.path = path
        self.within = within

    def integer(self, name: str, default: int = REQUIRED) -> int:
        value = self._value(name, default, "a whole number")
        # JSON has no whole numbers of another type, but true is an int to Python.
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(name, "must be a whole number")
        return value

    def optional_integer(self, name: str, default: int | None = REQUIRED) -> int | None:
        """None where the field is null."""
        return None if name in self.values and self.values[name] is None else self.integer(name, default or REQUIRED)

    def number(self, name: str, default: float = REQUIRED) -> float:
        value = self._value(name, default, "a number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refusal(name, "must be a number")
        return float(value)

    def boolean(self, name: str, default: bool = REQUIRED) -> bool:
        value = self._value(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.refusal(name, "must be true or false")
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str = REQUIRED) -> str:
        listed = " or ".join(json.dumps(value) for value in allowed)
        value = self._value(name, default, listed)
        if value not in allowed:
            raise self.refusal(name, f"must be {listed}")
        return value

    def inner(self, name: str) -> "Fields":
        """The object that a field holds."""
        value = self._value(name, REQUIRED, "an object")
        if not isinstance(value, dict):
            raise self.refusal(name, "must be an object")
        return Fields(value, self.path, f"{self.within}{name}.")

    def refusal(self, name: str, right: str) -> HuggingFaceConfigError:
        """The error of a field that is there, for the caller to raise."""
        value = json.dumps(self.values.get(name))
        shown = value if len(value) <= 80 else value[:77] + "..."
        return HuggingFaceConfigError(f"{self.path}: {self.within}{name}={shown} {right}")

    def _value(self, name: str, default: Any, right: str) -> Any:
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise HuggingFaceConfigError(f"{self.path}: {self.within}{name} is missing: it must be {right}")
        return value
