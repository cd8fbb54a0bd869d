import numpy as np
import pytest
from tokenizers import Tokenizer

from dsv3_jax.data.documents import Document
from dsv3_jax.data.fill_in_the_middle import cut_for_fill_in_the_middle
from dsv3_jax.data.pipeline import training_tokens
from dsv3_jax.data.tokenizer import encode, special_tokens


def test_pieces_join_to_the_text_and_none_is_empty() -> None:
    random, text = np.random.default_rng(0), "añ👩‍👧\r\ne\u0301"
    cuts = set()
    for _ in range(500):
        pieces = cut_for_fill_in_the_middle(text, 1.0, random)
        assert pieces.prefix + pieces.middle + pieces.suffix == text
        assert pieces.prefix and pieces.middle and pieces.suffix
        cuts.add((len(pieces.prefix), len(pieces.middle)))
    # Every pair of different inner places is reached.
    assert len(cuts) == (len(text) - 1) * (len(text) - 2) // 2


def test_rate() -> None:
    def cut(rate: float) -> int:
        random = np.random.default_rng(3)
        return sum(cut_for_fill_in_the_middle("some text", rate, random) is not None for _ in range(4000))

    assert (cut(0.0), cut(1.0)) == (0, 4000)
    # Six standard deviations of a binomial.
    assert abs(cut(0.1) - 400) < 6 * (4000 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize("text", ["", "a", "ab"])
def test_short_texts_are_left_alone(text: str) -> None:
    assert cut_for_fill_in_the_middle(text, 1.0, np.random.default_rng(0)) is None


def test_the_generator_decides() -> None:
    first, again, other = (cut_for_fill_in_the_middle("x" * 10_000, 1.0, np.random.default_rng(s)) for s in (5, 5, 6))
    assert first == again != other


def test_tokens_are_in_prefix_suffix_middle_order(documents: list[Document], tokenizer: Tokenizer) -> None:
    special, random = special_tokens(tokenizer), np.random.default_rng(0)
    for document in documents:
        ids = training_tokens(document.text, tokenizer, special, 1.0, random).tolist()
        assert [index for index in ids if index < 10] == [
            special.beginning, special.fim_begin, special.fim_hole, special.fim_end, special.end
        ]  # fmt: skip
        assert ids[:2] == [special.beginning, special.fim_begin]
        hole, end = ids.index(special.fim_hole), ids.index(special.fim_end)
        prefix, suffix, middle = (
            tokenizer.decode(part) for part in (ids[2:hole], ids[hole + 1 : end], ids[end + 1 : -1])
        )
        assert prefix + middle + suffix == document.text


def test_without_cutting_a_document_is_framed(tokenizer: Tokenizer) -> None:
    ids = training_tokens("if x", tokenizer, special_tokens(tokenizer), 0.0, np.random.default_rng(0))
    assert ids.dtype == np.int32
    assert ids.tolist() == [0, *encode(tokenizer, "if x"), 1]
