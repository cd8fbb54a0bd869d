"""What every part of conversion raises."""

from dsv3_jax.errors import UserError


class ConversionError(UserError):
    """A checkpoint that cannot be converted, or not to where it was asked for. The message names file and tensor."""
