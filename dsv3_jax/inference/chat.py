"""Chats as token ids: the messages through the model's chat template, only the template placing special tokens."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from dsv3_jax.data.tokenizer import SPECIAL_TOKENS, encode, special_tokens
from dsv3_jax.inference.chat_messages import LONGEST_CHAT, Marker, all_texts, checked_messages
from dsv3_jax.inference.chat_rendering import ChatError, compiled, one_line, rendered

__all__ = ["DEEPSEEK", "ChatError", "ChatTemplate", "chat_template"]

LONGEST_PROMPT = 2 * LONGEST_CHAT
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GIVEN_BY_US = frozenset(("messages", "add_generation_prompt", *NAMED_TOKENS))

# DeepSeek's layout without its tools, of which a tokenizer trained here has no tokens. Nothing stands between the
# parts. The thinking of earlier turns is left out; that of a message to be continued stays.
DEEPSEEK = """\
{{- bos_token }}
{%- for message in messages if message.role == 'system' %}
    {{- '' if loop.first else '\\n\\n' }}{{ message.content }}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.tool_calls %}
        {{- raise_exception('the model has no format for tools') }}
    {%- elif message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {%- set continued = loop.last and continue_final_message %}
        {{- '<｜Assistant｜>' + (message.content if continued else message.content.split('</think>') | last) }}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' + ('<think>\\n' if thinking else '') }}
{%- endif %}
"""
USER, ASSISTANT = SPECIAL_TOKENS[6:8]


class ChatTemplate:
    """How a model wants its chats written.

    `source` is the template's text.
    """

    def __init__(self, source: str, name: str, tokenizer: Tokenizer, named_tokens: Mapping[str, str]):
        self.source = source
        self._template = compiled(source, name)
        self._tokenizer = tokenizer
        self._named_tokens = dict(named_tokens)
        self._ids = _special_ids(tokenizer)
        beginning = self._ids.get(named_tokens.get("bos_token", ""))
        self._beginning = special_tokens(tokenizer).beginning if beginning is None else beginning

    def token_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **extra: Any,
    ) -> list[int]:
        """The prompt for these messages. It begins with exactly one beginning token, if the tokenizer has one.

        A special token comes from the template alone. A message that spells one is encoded as the text that it is,
        with one exception: the tags around the thinking that an assistant's message begins with are the model's own,
        and are tokens where the template keeps them.

        Args:
            messages: [{"role": ..., "content": ...}, ...] with a role of system, developer, user, assistant or tool; a
                content that is a text, null, or a list of {"type": "text", "text": ...}.
            add_generation_prompt: end with what asks the model for an answer.
            continue_final_message: end within the last message, an assistant's, for the model to go on with it; then
                there is no generation prompt.
            extra: what else the template may ask for, such as tools, documents, thinking; made of what JSON has.

        Raises:
            ChatError: messages that are not as above or too long; a template that raises or does not end.
        """
        try:
            return self._token_ids(messages, add_generation_prompt, continue_final_message, extra)
        except RecursionError as error:
            raise ChatError("the messages are nested too deeply") from error

    def _token_ids(self, messages: Any, generation_prompt: bool, continued: bool, extra: dict[str, Any]) -> list[int]:
        if reserved := sorted(GIVEN_BY_US & extra.keys()):
            raise ChatError(f"{reserved[0]} cannot be given to the chat template by a request")
        checked = checked_messages(messages)
        texts = [*all_texts(checked, "messages"), *all_texts(extra, "the template's arguments")]
        if (length := sum(map(len, texts))) > LONGEST_CHAT:
            raise ChatError(f"the messages have {length:,} characters, at most {LONGEST_CHAT:,} can be read")
        marker = Marker(self._ids, [*texts, self.source])
        marked = [marker.marked_message(self._with_known_role(message)) for message in checked]
        if continued:
            if checked[-1]["role"] != "assistant" or not checked[-1]["content"]:
                raise ChatError("continue_final_message needs a last message of role assistant with a text to continue")
            # The space tells whether the template trims the message.
            marked[-1]["content"] += marker.end + " "
        variables = {
            "tools": None,
            "documents": None,
            **marker.marked(extra),
            **self._named_tokens,
            "messages": marked,
            "add_generation_prompt": generation_prompt and not continued,
            "continue_final_message": continued,
        }
        prompt = rendered(self._template, variables, LONGEST_PROMPT)
        if continued:
            prompt = _cut(prompt, marker.end)
        return self._encoded(marker, prompt)

    def _with_known_role(self, message: dict[str, Any]) -> dict[str, Any]:
        # OpenAI's newer name for system. Most templates, DeepSeek's too, skip a role they do not know.
        if message["role"] == "developer" and "developer" not in self.source:
            return {**message, "role": "system"}
        return message

    def _encoded(self, marker: Marker, prompt: str) -> list[int]:
        ids: list[int] = []
        for text, is_special in marker.pieces(prompt):
            ids += [self._ids[text]] if is_special else encode(self._tokenizer, text)
        if not ids:
            raise ChatError("the chat template writes nothing for these messages")
        if self._beginning is None:
            return ids
        # Of templates and servers that each write one, a model got two, which it never saw in training.
        first = next((index for index, token in enumerate(ids) if token != self._beginning), len(ids))
        return [self._beginning, *ids[first:]]


def chat_template(files: Mapping[str, str] | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template that came with a model, or DeepSeek's layout for a model that came with none.

    DeepSeek's layout here takes `thinking`: whether the generation prompt opens the thinking, as R1 wants it.

    Args:
        files: texts of chat_template.jinja, tokenizer_config.json and special_tokens_map.json, those that there are.

    Raises:
        ChatError: a file that is not what its name says, or no template and a tokenizer without DeepSeek's tokens.
        DataError: the tokenizer has no token that ends a text.
    """
    files = files or {}
    config = _json_object(files, "tokenizer_config.json")
    names = _named_tokens(config, _json_object(files, "special_tokens_map.json"), tokenizer)
    if source := files.get("chat_template.jinja"):
        return ChatTemplate(source, "chat_template.jinja", tokenizer, names)
    name = "chat_template of tokenizer_config.json"
    of_config = config.get("chat_template")
    if isinstance(of_config, list):
        of_config = next((one.get("template") for one in of_config if _is_default(one)), None)
        if of_config is None:
            raise ChatError(f'{name} is a list without one named "default"')
    if of_config:
        if not isinstance(of_config, str):
            raise ChatError(f"{name} is of type {type(of_config).__name__}, must be a text or a list")
        return ChatTemplate(of_config, name, tokenizer, names)
    if missing := [token for token in (USER, ASSISTANT) if token not in _special_ids(tokenizer)]:
        raise ChatError(f"the model came without a chat template, and its tokenizer has no {missing[0]} for DeepSeek's")
    return ChatTemplate(DEEPSEEK, "DeepSeek's layout", tokenizer, names)


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens that `encode` never makes of a text."""
    return {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _named_tokens(config: dict[str, Any], of_map: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token and its like, as texts; those that the files do not mention are those of the tokenizer."""
    special = special_tokens(tokenizer)
    found: dict[str, Any] = {}
    for name, index in (("bos_token", special.beginning), ("eos_token", special.end), ("pad_token", special.padding)):
        if index is not None:
            found[name] = tokenizer.id_to_token(index)
    found |= {name: entry[name] for entry in (of_map, config) for name in NAMED_TOKENS if name in entry}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _json_object(files: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name) or "{}")
    except ValueError as error:
        raise ChatError(f"{name} is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ChatError(f"{name} is not an object of JSON")
    return value


def _is_default(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("name") == "default"


def _cut(prompt: str, end: str) -> str:
    """A prompt up to the mark `end`; without the space before it where the template trimmed the space after it."""
    text, found, after = prompt.rpartition(end)
    if not found:
        raise ChatError("the chat template leaves out the last message, which therefore cannot be continued")
    return text if after.startswith(" ") else text.rstrip()
