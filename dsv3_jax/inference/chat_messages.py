"""Messages of a chat: checked, and marked so that what they spell stays apart from what a template writes."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsv3_jax.inference.chat_rendering import ChatError

ROLES = ("system", "developer", "user", "assistant", "tool")
LONGEST_CHAT = 4_000_000
"""Characters in one request; DeepSeek-V3's whole context, 163840 tokens, is well under a million of ordinary text."""

# Private-use characters first: seldom in a text, and in no template.
MARKS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
# An assistant's thinking is what its message begins with, up to the first closing tag; the prompt that it answered may
# have held the opening one. Any other tag, in whatever message, is text.
THINKING = re.compile(r"(\s*<think>)?(.*?)(</think>)", re.DOTALL)
OPENED = re.compile(r"\s*<think>")


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages with contents that are plain texts; a null one is empty, or stays null beside tool calls.

    Other fields that are there (name, tool_calls, reasoning_content) are kept for the template, null ones are not.

    Raises:
        ChatError: not a list of messages as OpenAI's interface has them.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ChatError("messages must be a list of at least one {role, content}")
    return [_checked(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatError(f"{name} is {_kind(message)}, must be an object {{role, content}}")
    if message.get("role") not in ROLES:
        raise ChatError(f"{name}.role is {message.get('role')!r:.50}, must be one of {' '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list | tuple):
        # Parts are pieces of their own, a file and a question about it; other servers put them on lines, too.
        content = "\n".join(_text_of_part(part, f"{name}.content[{index}]") for index, part in enumerate(content))
    if content is not None and not isinstance(content, str):
        raise ChatError(f"{name}.content is {_kind(content)}, must be a text, null, or a list of text parts")
    if content is None and not message.get("tool_calls"):
        content = ""
    others = {key: value for key, value in message.items() if value is not None}
    return {**others, "content": content}


def _text_of_part(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = f"is {_kind(part)}" if kind in (None, "text") else f"has type {kind!r:.50}"
    raise ChatError(f'{name} {found}, must be {{"type": "text", "text": "..."}}: this model reads text only')


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def all_texts(value: Any, name: str) -> Iterator[str]:
    """Every text within a value made of what JSON has.

    Raises:
        ChatError: there is something else in it, or a text with half a surrogate pair, which has no bytes.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ChatError(f"{name} has half a surrogate pair at character {error.start}: not a text") from error
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ChatError(f"a key of {name} is {_kind(key)}, must be a text")
            yield from all_texts(key, f"a key of {name}")
            yield from all_texts(item, f"{name}.{key:.50}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from all_texts(item, f"{name}[{index}]")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ChatError(f"{name} is {_kind(value)}, which JSON does not have")


class Marker:
    """Marks spellings of special tokens in texts that are none of the template's.

    The mark is a character that no text of this request contains, put inside a spelling, after its first character:
    with it there the spelling is none. Text that ends or begins like a part of a spelling gets one there, too, so that
    it makes no spelling together with what the template writes next to it. Marks are no whitespace and the whitespace
    around a text stays outermost, so a template can trim it.
    """

    def __init__(self, spellings: Iterable[str], texts: Iterable[str]):
        taken = set().union(*texts)
        free = (chr(code) for codes in MARKS for code in codes if chr(code) not in taken)
        # The second one marks where a message ends that is to be continued.
        self.mark, self.end = next(free, ""), next(free, "")
        if not self.end:
            raise ChatError("the messages use every private-use character there is, one must be left")
        self._spellings = _spellings(frozenset(spellings), self.mark)

    def pieces(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """Marked text cut at the spellings that have no mark: (text, whether it is such a spelling), marks removed."""
        position = 0
        for match in self._spellings.pattern.finditer(rendered):
            if match.start() > position:
                yield rendered[position : match.start()].replace(self.mark, ""), False
            yield match[0], True
            position = match.end()
        if position < len(rendered):
            yield rendered[position:].replace(self.mark, ""), False

    def marked(self, value: Any) -> Any:
        """A value as JSON has them, made anew with every text in it marked, and keys that are no plain names."""
        if isinstance(value, str):
            return self._marked_text(value)
        if isinstance(value, Mapping):
            return {key if key.isidentifier() else self.marked(key): self.marked(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(item) for item in value]
        return value

    def marked_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`marked`, but for the tags of an assistant's thinking: templates look for them, and they are the model's."""
        marked = self.marked(message) | {"role": message["role"]}
        content = message["content"]
        if message["role"] == "assistant" and content:
            if match := THINKING.match(content):
                opening, thinking, closing = match[1] or "", match[2], match[3]
            elif match := OPENED.match(content):
                opening, thinking, closing = match[0], "", ""
            else:
                return marked
            rest = content[match.end() :]
            marked["content"] = opening + self.marked(thinking) + closing + self.marked(rest)
        return marked

    def _marked_text(self, text: str) -> str:
        spellings, mark = self._spellings, self.mark
        count = 1
        while count:  # two spellings can share characters, and one pass sees the first
            text, count = spellings.pattern.subn(lambda match: match[0][0] + mark + match[0][1:], text)
        end = len(text.rstrip())
        if any(text[max(0, end - length) : end] in spellings.beginnings for length in range(1, spellings.longest)):
            text = text[:end] + mark + text[end:]
        start = len(text) - len(text.lstrip())
        if any(text[start : start + length] in spellings.endings for length in range(1, spellings.longest)):
            text = text[:start] + mark + text[start:]
        return text


class _Spellings:
    """What marking needs to know about special tokens."""

    def __init__(self, spellings: frozenset[str], mark: str):
        self.pattern = re.compile(_any_of(set(spellings), 0, mark))
        self.beginnings = {text[:length] for text in spellings for length in range(1, len(text))}
        self.endings = {text[-length:] for text in spellings for length in range(1, len(text))}
        self.longest = max(map(len, spellings), default=0)


def _any_of(texts: set[str], depth: int, mark: str) -> str:
    """A pattern of the longest of the texts, a tree by their characters: 800 alternatives in a row would be slow."""
    branches = []
    for first in sorted({text[0] for text in texts if text}):
        branches.append(re.escape(first) + _any_of({text[1:] for text in texts if text[:1] == first}, depth + 1, mark))
    if "" in texts:
        # In a spelling of a single character the mark can only come after it.
        branches.append(f"(?!{mark})" if depth == 1 else "")
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})" if branches else "(?!)"


# Too many in DeepSeek's tokenizer to look at anew for every request; the mark is nearly always the same.
@functools.lru_cache(maxsize=8)
def _spellings(spellings: frozenset[str], mark: str) -> _Spellings:
    return _Spellings(spellings, mark)
