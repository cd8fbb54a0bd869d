"""Stop strings in streamed text, against a search in the whole text."""

import random

import pytest

from dsv3_jax.data.tokenizer import SPECIAL_TOKENS, encode, train_tokenizer
from dsv3_jax.inference.sampling import SamplingError
from dsv3_jax.inference.stopping import Stops, StopWatch
from dsv3_jax.inference.streaming import TextStream


def whole(text: str, strings: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """One character more at a time, until the text ends in a stop string."""
    for end in range(1, len(text) + 1):
        ending = [string for string in strings if text.find(string, 0, end) >= 0]
        if ending:
            found = max(ending, key=len)
            return text[: end if include else text.find(found, 0, end)], found
    return text, None


def watched(pieces: list[str], watch: StopWatch) -> list[str]:
    return [watch.add(piece) for piece in pieces] + [watch.finish()]


def pieces_of(text: str, source: random.Random) -> list[str]:
    cuts = sorted(source.choices(range(len(text) + 1), k=source.randrange(8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("include", [False, True])
def test_any_pieces_show_what_the_whole_text_gives(include):
    source, found = random.Random(0), 0
    for _ in range(4000):
        text = "".join(source.choices("ab🙂", (4, 4, 1), k=source.randrange(30)))
        count = source.randrange(4)
        strings = tuple("".join(source.choices("ab🙂", k=source.randrange(1, 7))) for _ in range(count))
        watch = StopWatch(strings, include)
        shown = "".join(watched(pieces_of(text, source), watch))
        assert (shown, watch.found) == whole(text, strings, include), (text, strings)
        found += watch.found is not None
    assert 1000 < found < 3500


def test_only_the_possible_beginning_of_a_stop_string_is_held_back():
    source = random.Random(1)
    for _ in range(1000):
        text = "".join(source.choices("ab", k=20))
        strings = tuple("".join(source.choices("ab", k=source.randrange(2, 9))) for _ in range(2))
        watch, seen, shown = StopWatch(strings), "", ""
        for piece in pieces_of(text, source):
            shown, seen = shown + watch.add(piece), seen + piece
            if watch.found is not None:
                break
            held = seen[len(shown) :]
            ends = [seen[start:] for start in range(len(seen)) if any(s.startswith(seen[start:]) for s in strings)]
            assert seen.startswith(shown) and held == max(ends, key=len, default="")


@pytest.mark.parametrize(
    ("strings", "pieces", "shown"),
    [
        ((), ["a", "", "b"], ["a", "", "b", ""]),
        (("\n",), ["one", " two\nthree", "\n"], ["one", " two", "", ""]),
        (("END",), ["a E", "N", "x EN"], ["a ", "", "ENx ", "EN"]),
        (("END",), ["E", "N", "D", "more"], ["", "", "", "", ""]),
        (("aab",), ["aa", "a", "b"], ["", "a", "", ""]),
        # Complete first, though the other begins earlier.
        (("abcd", "bc"), ["xab", "cd"], ["x", "a", ""]),
        # Complete with the same character: the longest.
        (("bc", "abc"), ["xab", "cd"], ["x", "", ""]),
    ],
)
def test_what_is_shown_when(strings, pieces, shown):
    assert watched(pieces, StopWatch(strings)) == shown


def test_a_stop_string_may_span_tokens_and_bytes():
    bytes_only = train_tokenizer(["a"], 256 + len(SPECIAL_TOKENS))
    stream, watch, shown = TextStream(bytes_only), StopWatch(("字🙂",)), []
    for token in encode(bytes_only, "漢字漢字🙂 more"):
        shown.append(watch.add(stream.add([token])))
        if watch.found is not None:
            break
    assert "".join(shown) == "漢字漢" and watch.finish() == "" and watch.found == "字🙂"


def test_stop_ids_and_empty_strings():
    stops = Stops(("a",), frozenset({5, 9}))
    assert [stops.place(ids) for ids in ([], [1, 2], [5], [1, 9, 5])] == [None, None, 0, 1]
    assert Stops().place([1]) is None
    with pytest.raises(SamplingError, match="a stop string is empty: it needs at least one character"):
        Stops(("a", ""))
