"""The one error of this package."""

from dsv3_jax.errors import UserError


class DataError(UserError, ValueError):
    """Text or a tokenizer that cannot be used. The message names the file, what is wrong and what would be right."""
