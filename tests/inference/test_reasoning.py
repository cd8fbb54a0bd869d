"""What was thought and what was answered, however the reply comes in pieces."""

import random
import re

import pytest
from tokenizers import Tokenizer

from dsv3_jax.data.tokenizer import SPECIAL_TOKENS, encode, special_tokens, train_tokenizer
from dsv3_jax.inference.chat import chat_template
from dsv3_jax.inference.reasoning import ReasoningStream, ReasoningText, Split, opens_thinking


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a"], 256 + len(SPECIAL_TOKENS))


@pytest.fixture(scope="module")
def without_tags(tokenizer):
    """Tags are text to it."""
    text = tokenizer.to_str().replace('"<think>"', '"<｜one｜>"').replace('"</think>"', '"<｜two｜>"')
    other = Tokenizer.from_str(text)
    other.encode_special_tokens = True
    return other


def slow_split(text, thinking):
    """The whole reply at once."""
    if match := re.match(r"\s*<think>", text):
        text, thinking = text[match.end() :], True
    if not thinking:
        return "", text
    reasoning, _, answer = text.partition("</think>")
    return reasoning, answer


def joined(stream, pieces):
    total = Split()
    for piece in pieces:
        total += stream.add(piece)
    return total + stream.finish()


def test_any_cut_of_any_text_gives_the_same():
    draw = random.Random(0)
    parts = ["<think>", "</think>", "<", "</", "think>", "</thin", "<thi", " ", "\n", "a", "é", "🙂"]
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randint(0, 8)))
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 6)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        thinking = draw.random() < 0.5
        assert joined(ReasoningText(thinking), pieces) == slow_split(text, thinking), (pieces, thinking)


def test_only_what_could_become_a_tag_is_held_back():
    stream = ReasoningText()
    assert stream.add("\n<thi") == Split()
    assert stream.add("nk>so </b") == Split("so </b", "")
    assert (stream.add("x</thi"), stream.thinking) == (Split("x", ""), True)
    assert stream.add("s </think") == Split("</this ", "")
    assert (stream.add(">yes <"), stream.thinking) == (Split("", "yes <"), False)
    assert stream.add("think></think>") == Split("", "think></think>")
    assert stream.finish() == Split()
    unfinished = ReasoningText(thinking=True)
    assert (unfinished.add("a</"), unfinished.finish(), unfinished.finish()) == (Split("a"), Split("</"), Split())


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_tags_that_are_tokens(tokenizer, size):
    opening, closing = (tokenizer.token_to_id(name) for name in SPECIAL_TOKENS[8:10])
    text = lambda part: encode(tokenizer, part)  # noqa: E731
    cut = text("漢")[:-1]  # ends within a character
    reply = [opening, *text("\né </think>"), *cut, closing, *text("漢 <think>"), special_tokens(tokenizer).end]
    pieces = [reply[start : start + size] for start in range(0, len(reply), size)]
    assert joined(ReasoningStream(tokenizer), pieces) == ("\né </think>\ufffd", "漢 <think>")
    assert joined(ReasoningStream(tokenizer, thinking=True), [text("a"), [closing], text("b")]) == ("a", "b")
    assert joined(ReasoningStream(tokenizer, thinking=True), [text("a")]) == ("a", "")
    assert joined(ReasoningStream(tokenizer), [text("a<think>")]) == ("", "a<think>")
    stream = ReasoningStream(tokenizer)
    assert [stream.add([token]) and stream.thinking for token in (opening, closing)] == [True, False]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_tags_that_are_text(without_tags, size):
    reply = encode(without_tags, "<think>é漢</think>🙂")
    assert len(reply) > 20
    pieces = [reply[start : start + size] for start in range(0, len(reply), size)]
    assert joined(ReasoningStream(without_tags), pieces) == ("é漢", "🙂")
    assert joined(ReasoningStream(without_tags), [reply[:-1]]) == ("é漢", "\ufffd")


def test_prompts_that_open_the_thinking(tokenizer, without_tags):
    user = [{"role": "user", "content": "What is <think>?"}]
    for one in (tokenizer, without_tags):
        template = chat_template(None, one)
        assert opens_thinking(one, template.token_ids(user, thinking=True))
        assert not opens_thinking(one, template.token_ids(user))
        for begun, opened in (("<think>\nSo", True), ("<think>\nSo</think>\nYes", False), ("Yes", False)):
            messages = [*user, {"role": "assistant", "content": begun}]
            assert opens_thinking(one, template.token_ids(messages, continue_final_message=True)) is opened
            assert not opens_thinking(one, template.token_ids([*messages, *user]))
    assert not opens_thinking(tokenizer, [])
