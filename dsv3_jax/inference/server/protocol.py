"""Requests of OpenAI's interface, read and checked: what is asked for, in this project's terms.

Fields that nothing here knows are ignored, as OpenAI's server does. Fields that are known, not supported, and would
change the reply are refused by name.
"""

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dsv3_jax.inference.requests import MOST_LOGPROBS
from dsv3_jax.inference.sampling import Sampling, SamplingError
from dsv3_jax.inference.server.errors import NOT_FOUND, RequestError
from dsv3_jax.inference.server.fields import Fields, shown

MOST_TOKENS = 2**31 - 1
MOST_CHOICES = 128  # of one prompt
MOST_PROMPTS = 1024
MOST_STOPS = 64
LONGEST_STOP = 1000
COMPLETION_TOKENS = 16  # OpenAI's default; a chat's is what there is room for

# What each may be and still change nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    # SGLang's, which asks for another form than `routed_experts`: base64, the prompt's tokens included.
    "return_routed_experts": (False,),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
}


@dataclass(frozen=True)
class Settings:
    """What both kinds of completion have in common."""

    sampling: Sampling
    max_tokens: int | None
    """None: as many as there is room for, see `Service.tokens_left`."""
    choices: int
    """For each prompt."""
    stop: tuple[str, ...]
    include_stop: bool
    """The stop string that ends a text belongs to it."""
    stop_ids: frozenset[int]
    """Tokens that end a text beside the model's own."""
    logprobs: int | None
    """Alternatives to report with each token; None: no log probabilities at all."""
    routed_experts: bool
    """Report the experts that made each token."""
    stream: bool
    include_usage: bool
    """In a stream, end with a chunk that counts the tokens."""


@dataclass(frozen=True)
class CompletionRequest:
    settings: Settings
    prompts: list[str | list[int]]
    echo: bool
    add_special_tokens: bool
    """A text begins with the beginning token, as documents in training."""


@dataclass(frozen=True)
class ChatRequest:
    settings: Settings
    conversation: "Conversation"


@dataclass(frozen=True)
class Conversation:
    """Arguments of ChatTemplate.token_ids."""

    messages: Any
    add_generation_prompt: bool
    continue_final_message: bool
    extra: dict[str, Any]


def completion_request(body: Any, model: str, known_ids: Collection[int]) -> CompletionRequest:
    """A request to /v1/completions.

    Args:
        model: the name of the only model there is.
        known_ids: token ids that a prompt may contain.

    Raises:
        RequestError: anything else than what this interface takes.
    """
    fields = Fields(body)
    _check_model(fields, model)
    _refuse(fields)
    logprobs = fields.whole("logprobs", None, 0, MOST_LOGPROBS)
    max_tokens = fields.whole("max_tokens", COMPLETION_TOKENS, 0, MOST_TOKENS)
    settings = _settings(fields, max_tokens, logprobs, known_ids)
    if fields.whole("best_of", settings.choices, 1, MOST_CHOICES) != settings.choices:
        raise fields.error("best_of", f"is not supported: it must be absent or equal n={settings.choices}")
    prompts = read_prompts(fields, "prompt", known_ids)
    if (choices := len(prompts) * settings.choices) > MOST_PROMPTS:
        raise fields.error(
            "n", f"makes {choices} choices of {len(prompts)} prompts, at most {MOST_PROMPTS} are possible"
        )
    return CompletionRequest(settings, prompts, fields.flag("echo"), fields.flag("add_special_tokens", True))


def chat_request(body: Any, model: str, known_ids: Collection[int]) -> ChatRequest:
    """A request to /v1/chat/completions; arguments and errors as in `completion_request`.

    What is wrong with the messages themselves is the chat template's to say.
    """
    fields = Fields(body)
    _check_model(fields, model)
    _refuse(fields)
    top = fields.whole("top_logprobs", None, 0, MOST_LOGPROBS)
    wants_logprobs = fields.flag("logprobs")
    if top is not None and not wants_logprobs:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    names = [name for name in ("max_completion_tokens", "max_tokens") if fields.get(name) is not None]
    max_tokens = fields.whole(names[0], None, 1, MOST_TOKENS) if names else None
    settings = _settings(fields, max_tokens, (top or 0) if wants_logprobs else None, known_ids)
    return ChatRequest(settings, conversation(fields))


def conversation(fields: Fields) -> Conversation:
    if fields.get("messages") is None:
        raise fields.error("messages", "is missing")
    continued = fields.flag("continue_final_message")
    extra = fields.object("chat_template_kwargs").values()
    if (documents := fields.get("documents")) is not None:
        extra["documents"] = documents
    for name in ("messages", "add_generation_prompt", "continue_final_message"):
        if name in extra:
            raise fields.error("chat_template_kwargs", f"cannot contain {name}")
    generation_prompt = fields.flag("add_generation_prompt", not continued)
    return Conversation(fields.get("messages"), generation_prompt, continued, extra)


def read_prompts(fields: Fields, name: str, known_ids: Collection[int]) -> list[str | list[int]]:
    """A text, a list of texts, a list of token ids, or a list of lists of token ids."""
    value = fields.get(name)
    if value is None:
        raise fields.error(name, "is missing")
    if isinstance(value, str):
        return [fields.as_text(value, name)]
    if not isinstance(value, list):
        raise fields.error(name, f"must be a text, texts, token ids, or lists of token ids, not {shown(value)}")
    if not value:
        raise fields.error(name, "is an empty list")
    if not isinstance(value[0], str | list):
        return [token_ids(fields, name, value, known_ids)]
    if len(value) > MOST_PROMPTS:
        raise fields.error(name, f"has {len(value)} prompts, at most {MOST_PROMPTS} can be in one request")
    if isinstance(value[0], str):
        return [fields.as_text(item, f"{name}[{index}]") for index, item in enumerate(value)]
    return [token_ids(fields, f"{name}[{index}]", item, known_ids) for index, item in enumerate(value)]


def token_ids(fields: Fields, name: str, value: Any, known_ids: Collection[int]) -> list[int]:
    if not isinstance(value, list) or not value:
        raise fields.error(name, f"must be a list of at least one token id, not {shown(value)}")
    for index, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int) or token not in known_ids:
            raise fields.error(f"{name}[{index}]", f"must be the id of a token of this model, not {shown(token)}")
    return value


def _settings(fields: Fields, max_tokens: int | None, logprobs: int | None, known_ids: Collection[int]) -> Settings:
    ids = fields.get("stop_token_ids") or []
    stream = fields.flag("stream")
    if not stream and fields.get("stream_options") is not None:
        raise fields.error("stream_options", "needs stream to be true")
    choices = fields.whole("n", 1, 1, MOST_CHOICES)
    assert choices is not None
    return Settings(
        sampling=_sampling(fields),
        max_tokens=max_tokens,
        choices=choices,
        stop=_stop(fields),
        include_stop=fields.flag("include_stop_str_in_output"),
        stop_ids=frozenset(token_ids(fields, "stop_token_ids", ids, known_ids) if ids else ()),
        logprobs=logprobs,
        routed_experts=fields.flag("routed_experts"),
        stream=stream,
        include_usage=fields.object("stream_options").flag("include_usage"),
    )


def _sampling(fields: Fields) -> Sampling:
    """With OpenAI's defaults, which are the model's own distribution; without a seed, one that nobody knows."""
    seed = fields.whole("seed", None, -(2**63), 2**64 - 1)
    top_k = fields.whole("top_k", 0, -1, MOST_TOKENS)
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    defaults = (1.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    numbers = {name: fields.number(name, default) for name, default in zip(names, defaults, strict=True)}
    try:
        return Sampling(
            seed=secrets.randbits(32) if seed is None else seed % 2**32,
            top_k=max(top_k or 0, 0),  # -1 is what others call off
            **numbers,
        )
    except SamplingError as error:
        raise RequestError(str(error), str(error).partition("=")[0]) from error


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list):
        raise fields.error("stop", f"must be a text or a list of texts, not {shown(value)}")
    if len(strings) > MOST_STOPS:
        raise fields.error("stop", f"has {len(strings)} texts, at most {MOST_STOPS} can be given")
    for string in strings:
        if not 1 <= len(fields.as_text(string, "stop")) <= LONGEST_STOP:
            raise fields.error("stop", f"must have 1 to {LONGEST_STOP} characters, not {len(string)}")
    return tuple(strings)


def _check_model(fields: Fields, model: str) -> None:
    asked = fields.text("model")
    if asked is not None and asked != model:
        message = f"the model {shown(asked)} does not exist; there is {model!r}"
        raise RequestError(message, "model", status=NOT_FOUND, code="model_not_found")


def _refuse(fields: Fields) -> None:
    for name, harmless in REFUSED.items():
        value = fields.get(name)
        if value is not None and value not in harmless:
            raise fields.error(name, "is not supported by this server")
