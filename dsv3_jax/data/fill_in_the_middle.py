"""Fill in the middle (V3 section 4.1): a document becomes prefix, suffix, middle.

The cuts fall between characters, before tokenisation: at generation the hole opens wherever the cursor stands, often
inside what would have been one token, and the model must have seen such edges (Bavarian et al. 2022, section 4.3).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pieces:
    """A document as prefix + middle + suffix, none of them empty."""

    prefix: str
    middle: str
    suffix: str


def cut_for_fill_in_the_middle(text: str, rate: float, random: np.random.Generator) -> Pieces | None:
    """With probability `rate`, the text cut at two different random places; otherwise None.

    A text of fewer than three characters cannot be cut and is left alone.
    """
    if random.random() >= rate or len(text) < 3:
        return None
    first, second = sorted((1 + random.choice(len(text) - 1, size=2, replace=False)).tolist())
    return Pieces(text[:first], text[first:second], text[second:])
