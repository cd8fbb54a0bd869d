"""Chats: read, rendered as they will be asked for, packed whole, and learnt where an assistant speaks."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from configs.tiny_sft import config as tiny_sft
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.config_checks import check
from dsv3_jax.data.chat_rows import ChatBatches, ChatEncoder, chat_validation_batches
from dsv3_jax.data.chats import Chat, chat_of, open_chats
from dsv3_jax.data.errors import DataError
from dsv3_jax.data.tokenizer import encode, train_tokenizer
from dsv3_jax.inference.chat import ChatError, chat_template
from dsv3_jax.inference.stopping import stop_ids
from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks import build
from dsv3_jax.tasks.problem import parts_of

BEGINNING, END, USER, ASSISTANT, THINK, END_THINK = 0, 1, 6, 7, 8, 9
CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def make_config(sequence_length: int = 40, batch_size: int = 3, **data: object) -> Config:
    training = dataclasses.replace(tiny_sft.training, sequence_length=sequence_length, batch_size=batch_size)
    return dataclasses.replace(tiny_sft, training=training, data=dataclasses.replace(tiny_sft.data, **data))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["what is the sum of one and two? it is three, not four. " * 5], 330)


@pytest.fixture(scope="module")
def chats() -> list[Chat]:
    """Of different lengths, all of them short of 41 tokens, and none like another."""
    return [
        chat_of(f"what is {number}?", f"<think>{'not ' * (number % 5)}</think>it is {number}", f"chat {number}")
        for number in range(30)
    ]


def encoder(tokenizer: Tokenizer, config: Config, files: dict[str, str] | None = None) -> ChatEncoder:
    return ChatEncoder(chat_template(files, tokenizer), tokenizer, config)


def examples_in(batch: dict[str, np.ndarray]) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of every segment of a batch, and which of them are learnt."""
    for tokens, segments, positions, learnt in zip(*(batch[name] for name in batch), strict=True):
        assert not learnt[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            assert (np.diff(places) == 1).all() and (positions[places] == np.arange(len(places))).all()
            yield tokens[places].tolist(), learnt[places].tolist()


def whole(batch: dict[str, dict[int, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([blocks[first] for first in sorted(blocks)]) for name, blocks in batch.items()}


def test_trap_L9_the_response_and_its_end_are_learnt_and_the_prompt_is_not(tokenizer: Tokenizer):
    chat = chat_of("what is one?", "<think>it is</think>one", "chat")
    ((tokens, learnt),) = encoder(tokenizer, make_config())(chat)
    prompt = [BEGINNING, USER, *encode(tokenizer, "what is one?"), ASSISTANT]
    response = [THINK, *encode(tokenizer, "it is"), END_THINK, *encode(tokenizer, "one"), END]
    assert tokens.tolist() == prompt + response
    assert learnt.tolist() == [0] * len(prompt) + [1] * len(response)


def test_trap_L5_an_end_that_is_also_the_padding_is_learnt(tokenizer: Tokenizer, chats: list[Chat]):
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if "pad" not in token["content"]]
    same = Tokenizer.from_str(json.dumps(content))
    config = make_config()
    batches = list(chat_validation_batches(chats, encoder(same, config), config))
    found = [example for batch in batches for example in examples_in(batch)]
    assert len(found) == len(chats)
    assert all(tokens[-1] == END and learnt[-1] == 1 and END not in tokens[:-1] for tokens, learnt in found)


def test_another_template_ends_turns_with_its_own_token(tokenizer: Tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    ids = {name: other.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>")}
    files = {"chat_template.jinja": CHATML, "generation_config.json": json.dumps({"eos_token_id": ids["<|im_end|>"]})}
    ((tokens, learnt),) = encoder(other, make_config(), files)(chat_of("one?", "two", "chat"))
    said = [*encode(other, "two"), ids["<|im_end|>"]]
    assert tokens[learnt == 1].tolist() == said
    assert tokens[-1] in stop_ids(files, other)


def test_every_turn_is_learnt_after_the_prompt_that_asks_for_it(tokenizer: Tokenizer):
    messages = (
        {"role": "system", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "<think>so</think>three"},
        {"role": "user", "content": "four"},
        {"role": "assistant", "content": "five"},
    )
    template = chat_template(None, tokenizer)
    first, second = encoder(tokenizer, make_config())(Chat("a", "", messages, "a"))
    for example, turn, text in ((first, 2, "so</think>three"), (second, 4, "five")):
        prompt = template.token_ids(messages[:turn])
        assert example.tokens[: len(prompt)].tolist() == prompt and not example.learnt[: len(prompt)].any()
        assert tokenizer.decode(example.tokens[len(prompt) : -1].tolist(), skip_special_tokens=False).endswith(text)
    assert THINK not in second.tokens  # the template leaves out the thinking of earlier turns


@pytest.mark.parametrize("streams", [1, 3])
def test_an_epoch_is_all_chats_each_whole_in_one_row(tokenizer: Tokenizer, chats: list[Chat], streams: int):
    config = make_config(streams=streams)
    encode_chat = encoder(tokenizer, config)
    expected = {tuple(example.tokens.tolist()) for chat in chats for example in encode_chat(chat)}
    batches = ChatBatches(chats, encode_chat, config)
    found = [example for _ in range(40) for example in examples_in(whole(next(batches)))]
    batches.close()
    counts = [sum(list(tokens) == example[0] for example in found) for tokens in expected]
    assert {tuple(tokens) for tokens, _ in found} == expected
    # Rows are given out in blocks of 64, so each chat has been there about as often as any other.
    assert min(counts) >= 2 and max(counts) - min(counts) <= 10
    assert all(sum(learnt) > 1 and learnt == sorted(learnt) for _, learnt in found)


def test_batches_go_on_from_a_saved_state(tokenizer: Tokenizer, chats: list[Chat]):
    config = make_config()
    batches = ChatBatches(chats, encoder(tokenizer, config), config)
    for _ in range(25):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [whole(next(batches)) for _ in range(30)]
    other = ChatBatches(chats, encoder(tokenizer, config), config)
    other.set_state(state)
    for batch in expected:
        for name, array in whole(next(other)).items():
            np.testing.assert_array_equal(array, batch[name])
    batches.close()
    other.close()


def test_validation_is_every_chat_once_in_full_batches(tokenizer: Tokenizer, chats: list[Chat]):
    config = make_config(batch_size=4)
    encode_chat = encoder(tokenizer, config)
    batches = list(chat_validation_batches(chats, encode_chat, config))
    assert all(array.shape == (4, 41) and array.dtype == np.int32 for batch in batches for array in batch.values())
    found = sorted(tokens for batch in batches for tokens, _ in examples_in(batch))
    assert found == sorted(example.tokens.tolist() for chat in chats for example in encode_chat(chat))


def test_files_hold_messages_or_problems_and_responses(tmp_path: Path):
    lines = [{"problem": f"p{n}", "response": f"r{n}"} for n in range(40)]
    lines += [{"messages": [{"role": "user", "content": f"u{n}"}, {"role": "assistant", "content": f"a{n}"}]}
              for n in range(40)]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = open_chats(make_config(path=str(tmp_path), validation_share=0.2))
    texts = {chat.text for source in (corpus.train, corpus.validation) for chat in source}
    assert texts == {f"p{n}\nr{n}" for n in range(40)} | {f"u{n}\na{n}" for n in range(40)}
    assert 0 < len(corpus.validation) < len(corpus.train)
    assert {chat.predicted for chat in corpus.validation} <= {f"{kind}{n}" for kind in "ra" for n in range(40)}


def test_demonstrations_are_of_the_tasks_own_splits():
    corpus = open_chats(make_config(path="task", demonstrations=50, formless=0.0))
    assert len(corpus.train) == 50 and len(corpus.validation) == tiny_sft.task.validation_problems
    assert corpus.train[3].messages[0]["content"].startswith("What is ")
    assert corpus.train[3].predicted.startswith("<think>")
    assert not {chat.text for chat in corpus.train} & {chat.text for chat in corpus.validation}


def test_a_task_without_demonstrations_is_refused(tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(f'{{"problem": "p{n}", "answer": "a"}}\n' for n in range(60)))
    config = dataclasses.replace(make_config(), task=TaskConfig(kind="json_lines", path=str(path)))
    with pytest.raises(ConfigError, match="data.path=task: task.kind=json_lines comes without demonstrations"):
        open_chats(config)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"text": "a"},
            "has no field 'messages' (data.messages_field) and no 'problem' (data.problem_field); its",
        ),
        ({"problem": "a"}, "and no 'response' (data.response_field); its fields: problem"),
        ({"problem": 1, "response": "a"}, "field 'problem' of"),
        ({"messages": "a"}, "must be a list of messages {role, content}"),
        ({"messages": [1]}, "must be a list of messages {role, content}"),
    ],
)
def test_a_line_without_a_chat_is_named(tmp_path: Path, line: dict, message: str):
    (tmp_path / "chats.jsonl").write_text("\n" + json.dumps(line))
    with pytest.raises(DataError) as caught:
        open_chats(make_config(path=str(tmp_path / "chats.jsonl")))
    assert message in str(caught.value) and "chats.jsonl:2" in str(caught.value) and "\n" not in str(caught.value)


def test_files_without_chats_are_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="has no file ending in one of .jsonl"):
        open_chats(make_config(path=str(tmp_path)))
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no chat: 1 files, all empty"):
        open_chats(make_config(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}], "has no message of role assistant: there is nothing to learn from it"),
        ([{"role": "assistant", "content": "a"}], "messages must be a list of at least one"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "with a text to continue"),
        (
            [{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}],
            "content is of type int",
        ),
    ],
)
def test_a_chat_that_cannot_be_learnt_is_named(tokenizer: Tokenizer, messages: list, message: str):
    with pytest.raises(DataError, match=f"^place: .*{message}|^place {message}"):
        encoder(tokenizer, make_config())(Chat("name", "", tuple(messages), "place"))


def test_trap_L9_a_chat_longer_than_a_row_is_never_cut(tokenizer: Tokenizer, chats: list[Chat]):
    long = chat_of("one " * 50, "two", "place")
    with pytest.raises(DataError, match="^place: a prompt of .* are longer than a row: set training.sequence_length="):
        encoder(tokenizer, make_config())(long)
    config = make_config(overlong_chats="leave_out")
    left_out = encoder(tokenizer, config)
    assert left_out(long) == []
    (batch,) = chat_validation_batches([chats[0], long, chats[1]], left_out, config)
    assert len(list(examples_in(batch))) == 2
    with pytest.raises(DataError, match="none of 1 chats fits a row of training.sequence_length=40"):
        ChatBatches([long], left_out, config)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}",
            "leaves out the last",
        ),
        ("{{ raise_exception('no') }}", "refuses these messages: no"),
    ],
)
def test_a_template_without_the_assistants_turn_is_refused(tokenizer: Tokenizer, template: str, message: str):
    with pytest.raises(ChatError, match=message):
        encoder(tokenizer, make_config(), {"chat_template.jinja": template})


def test_a_template_whose_prompt_is_not_what_stands_before_answers_is_refused(tokenizer: Tokenizer):
    template = (
        "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}answer: {% endif %}"
    )
    with pytest.raises(DataError, match="^place: what the chat template writes before the assistant's message 1"):
        encoder(tokenizer, make_config(), {"chat_template.jinja": template})(chat_of("one", "two", "place"))


@pytest.mark.parametrize(
    "data", [{"kind": "chats", "path": "stdlib"}, {"kind": "documents", "path": "task"}, {"demonstrations": 0}]
)
def test_a_path_of_the_other_kind_is_refused(data: dict):
    with pytest.raises(ConfigError, match="data.path=|data.demonstrations=0"):
        check(make_config(**data))


def test_a_share_of_the_demonstrations_has_the_answer_alone():
    config = make_config(path="task", demonstrations=400, answers_only=0.25, formless=0.0)
    chats, problem = open_chats(config).train, build(config.task).problem
    bare = [index for index, chat in enumerate(chats) if "<think></think>" in chat.predicted]
    assert 0.18 < len(bare) / len(chats) < 0.32
    assert all(problem(index).verify(chat.predicted).correct for index, chat in enumerate(chats))
    assert [index for index, chat in enumerate(chats) if "<think></think>" in chat.predicted] == bare


def test_a_share_of_the_demonstrations_has_no_tags_and_says_the_same():
    """What is left out or in of the working does not depend on the tags."""
    shares = {"path": "task", "demonstrations": 400, "answers_only": 0.25}
    formed, mixed = (open_chats(make_config(**shares, formless=share)).train for share in (0.0, 0.3))
    bare = 0
    for one, other in zip(formed, mixed, strict=True):
        thinking, answer = parts_of(one.predicted)
        lines = f"{thinking}\n{answer}" if thinking else answer
        assert other.predicted in (one.predicted, lines)
        bare += other.predicted == lines
    assert 0.23 < bare / 400 < 0.37
