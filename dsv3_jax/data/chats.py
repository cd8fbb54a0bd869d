"""Chats to learn from: JSON Lines of messages or of problems and responses, or a task's own demonstrations."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dsv3_jax import tasks
from dsv3_jax.config import Config, ConfigError, DataConfig
from dsv3_jax.data.corpus import Corpus, chosen_by_name, find_files
from dsv3_jax.data.documents import Document, JsonLines, names_in, text_of
from dsv3_jax.data.errors import DataError
from dsv3_jax.tasks import DemonstratedProblem, Problem
from dsv3_jax.tasks.problem import in_response_form, parts_of

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat(Document):
    """Messages as OpenAI's interface has them. The text is that of all of them."""

    messages: tuple[Message, ...]
    place: str
    """What errors call it."""

    @property
    def predicted(self) -> str:
        return _joined(message for message in self.messages if message.get("role") == "assistant")


class ChatSource(Protocol):
    """Chats by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Chat: ...

    def __iter__(self) -> Iterator[Chat]: ...


@dataclass(frozen=True)
class ChatCorpus(Corpus):
    """The two halves of what there is to learn from."""

    train: ChatSource
    validation: ChatSource


def open_chats(config: Config) -> ChatCorpus:
    """Open `data.path` and split it: a task by its own validation problems, files by a hash of their lines' names.

    Raises:
        DataError: nothing there, no .jsonl file, a first line that holds no chat, or an empty half.
        ConfigError: the task has no demonstrations, or too few problems.
    """
    data = config.data
    if data.path == "task":
        task = tasks.build(config.task)
        return ChatCorpus(
            Demonstrations(task.problem, data.demonstrations, config.task.kind, data),
            Demonstrations(task.validation.__getitem__, len(task.validation), f"{config.task.kind}, validation", data),
        )
    root, paths = find_files(data.path, (".jsonl",))
    files = [JsonLines(path) for path in paths]
    names = [path.relative_to(root).as_posix() for path in paths]
    places = [(file, row) for file in range(len(files)) for row in range(len(files[file]))]
    if not places:
        raise DataError(f"data.path={data.path!r} holds no chat: {len(paths)} files, all empty")
    chats = FileChats(files, np.array(places), data)
    chats[0]  # whoever named the wrong fields is told before anything is written
    held_out = chosen_by_name([f"{names[file]}:{files[file].line(row)}" for file, row in places], data.validation_share)
    return ChatCorpus(chats.where(~held_out), chats.where(held_out))


class FileChats:
    """Chats of .jsonl files, read on access."""

    def __init__(self, files: Sequence[JsonLines], places: np.ndarray, data: DataConfig):
        """`places`: int64 [chats, 2], the file and the row in it of every chat."""
        self._files, self._places, self._data = files, places, data

    def where(self, chosen: np.ndarray) -> "FileChats":
        return FileChats(self._files, self._places[chosen], self._data)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Chat:
        file, row = self._places[index].tolist()
        return read_chat(self._files[file][row], self._files[file].place(row), self._data)

    def __iter__(self) -> Iterator[Chat]:
        return (self[index] for index in range(len(self)))


class Demonstrations:
    """Solutions of a task's problems, some of them as people write: without the working, or without R1's form."""

    def __init__(self, problem: Callable[[int], Problem], count: int, name: str, data: DataConfig):
        self._problem, self._count, self._name, self._data = problem, count, name, data
        if not isinstance(problem(0), DemonstratedProblem):
            raise ConfigError(
                f"data.path=task: task.kind={name} comes without demonstrations; countdown and arithmetic have them, "
                "and .jsonl files can hold others"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Chat:
        problem = self._problem(index)
        assert isinstance(problem, DemonstratedProblem)
        place = f"problem {index} of {self._name}"
        thinking, answer = parts_of(problem.demonstration())
        if random.Random(f"{self._data.answers_only}: {place}").random() < self._data.answers_only:
            thinking = ""
        if random.Random(f"formless {self._data.formless}: {place}").random() < self._data.formless:
            return chat_of(problem.prompt, "\n".join(filter(None, (thinking, answer))), place)
        return chat_of(problem.prompt, in_response_form(thinking, answer), place)

    def __iter__(self) -> Iterator[Chat]:
        return (self[index] for index in range(len(self)))


def read_chat(value: dict[str, Any], place: str, data: DataConfig) -> Chat:
    """The chat in an object of JSON: its messages, else its problem and response.

    Raises:
        DataError: none of these fields is there, or one is not what it should be.
    """
    if data.messages_field in value:
        messages = value[data.messages_field]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise DataError(f"field {data.messages_field!r} of {place} must be a list of messages {{role, content}}")
        return Chat(place, _joined(messages), tuple(messages), place)
    fields = {"problem_field": data.problem_field, "response_field": data.response_field}
    for option, field in fields.items():
        if field not in value:
            raise DataError(
                f"{place} has no field {data.messages_field!r} (data.messages_field) and no {field!r} "
                f"(data.{option}); its fields: {names_in(value)}"
            )
    problem, response = (text_of(value[field], f"field {field!r} of {place}") for field in fields.values())
    return chat_of(problem, response, place)


def chat_of(prompt: str, response: str, place: str) -> Chat:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
    return Chat(place, _joined(messages), messages, place)


def _joined(messages: Any) -> str:
    return "\n".join(message["content"] for message in messages if isinstance(message.get("content"), str))
