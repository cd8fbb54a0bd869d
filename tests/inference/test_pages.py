"""The books of the paged cache, against a slow account of who holds what."""

import random

import pytest

from dsv3_jax.inference.pages import Pages, prefix_keys


def test_a_beginning_is_shared_and_its_pages_outlive_their_request():
    pages, keys = Pages(6), [b"a", b"b"]
    first, known = pages.take(keys, 3)
    assert known == 0
    pages.keep(first[0], b"a")
    pages.keep(first[1], b"b")
    second, known = pages.take(keys, 4)
    assert known == 2 and second[:2] == first[:2] and not set(second[2:]) & set(first)
    pages.check([first, second])
    assert (pages.used, pages.free, pages.cached) == (5, 1, 0)
    pages.release(first)
    pages.release(second)
    pages.check([])
    assert (pages.used, pages.free, pages.cached) == (0, 4, 2)
    assert pages.take([b"a", b"c"], 2)[1] == 1


def test_cached_pages_go_when_space_is_needed_the_end_of_the_oldest_beginning_first():
    pages = Pages(4)
    for keys in ([b"a", b"b"], [b"c"]):
        taken, _ = pages.take(keys, len(keys))
        for page, key in zip(taken, keys, strict=True):
            pages.keep(page, key)
        pages.release(taken)
    taken, known = pages.take([], 2)  # one was free
    assert known == 0
    pages.release(taken)
    assert pages.take([b"a", b"b"], 2)[1] == 1
    assert pages.take([b"c"], 1)[1] == 1


def test_what_does_not_fit_takes_nothing():
    pages = Pages(3)
    held, _ = pages.take([b"a"], 2)
    pages.keep(held[0], b"a")
    pages.release(held)
    # The known page is one of those left, and cannot be given up to make room beside itself.
    assert pages.take([b"a"], 4) is None and pages.take([b"b"], 4) is None
    assert len(pages.take([b"a"], 3)[0]) == 3


def test_one_piece_in_two_pages_is_kept_once():
    pages = Pages(2)
    (first,), (second,) = pages.take([], 1)[0], pages.take([], 1)[0]
    pages.keep(first, b"a")
    pages.keep(second, b"a")
    pages.release([first])
    pages.release([second])
    pages.check([])
    assert (pages.free, pages.cached) == (1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_the_books_are_right_after_any_history(seed):
    draw, pages, held, asked = random.Random(seed), Pages(12), [], 0
    for _ in range(400):
        if draw.random() < 0.5:
            keys = [bytes([draw.randrange(2)] * depth) for depth in range(1, draw.randrange(1, 5))]
            count = len(keys) + draw.randrange(1, 4)
            taken = pages.take(keys, count)
            if taken:
                asked += 1
                table, known = taken
                assert len(set(table)) == count
                for page, key in list(zip(table, keys, strict=False))[known:]:
                    pages.keep(page, key)
                held.append(table)
        elif held:
            pages.release(held.pop(draw.randrange(len(held))))
        pages.check(held)
    assert asked > 50


def test_keys_name_whole_pages_and_all_before_them():
    tokens = list(range(10, 42))
    assert len(prefix_keys(tokens[:16], 16, 0)) == 0  # the last token is not reused
    assert len(prefix_keys(tokens[:17], 16, 0)) == 1
    keys = prefix_keys(tokens, 8, 0)
    assert len(set(keys)) == 3
    assert prefix_keys(tokens[:16] + [1] * 9, 8, 0)[:3] == [*keys[:2], prefix_keys(tokens[:16] + [1] * 9, 8, 0)[2]]
    assert prefix_keys([1, *tokens[1:]], 8, 0)[1] != keys[1]
    # With one token ahead, a page is another one where another token follows.
    other = [*tokens[:16], 1, *tokens[17:]]
    assert prefix_keys(other, 8, 0)[:2] == keys[:2]
    assert prefix_keys(other, 8, 1)[0] == prefix_keys(tokens, 8, 1)[0]
    assert prefix_keys(other, 8, 1)[1] != prefix_keys(tokens, 8, 1)[1]
