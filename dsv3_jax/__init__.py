"""DeepSeek-V3 in JAX. `dsv3_jax.load(path)` opens a trained model; everything else is imported from its module."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Resolved at first use: the package itself imports without jax.
    if name == "load":
        from dsv3_jax.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
