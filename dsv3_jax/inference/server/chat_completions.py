"""/v1/chat/completions: messages answered, by the model's own chat template."""

from typing import Any

from starlette.concurrency import run_in_threadpool

from dsv3_jax.inference.server.errors import RequestError
from dsv3_jax.inference.server.protocol import ChatRequest, Conversation, Settings
from dsv3_jax.inference.server.service import Prepared, Service
from dsv3_jax.inference.server.streams import Delta
from dsv3_jax.inference.server.token_texts import TokenTexts


class ChatShape:
    """How /v1/chat/completions writes its choices; the reasoning where DeepSeek's interface has it."""

    prefix = "chatcmpl"
    whole, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, settings: Settings):
        self._texts, self._logprobs = texts, settings.logprobs is not None
        self._routed_experts = settings.routed_experts

    def choice(self, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        return {"index": delta.choice, "message": message, **self._rest(delta)}

    def opening(self, choice: int) -> list[dict[str, Any]]:
        return [self._piece(Delta(choice), {"role": "assistant", "content": ""})]

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        content = {"reasoning_content": delta.reasoning} if delta.reasoning else {}
        if delta.text:
            content["content"] = delta.text
        # OpenAI's chunk with the finish reason has nothing else in it.
        last = [self._piece(Delta(delta.choice, finish=delta.finish), {})] if delta.finish else []
        anything = content or delta.logprobs or delta.routed_experts
        return ([self._piece(delta._replace(finish=None), content)] if anything else []) + last

    def _piece(self, delta: Delta, content: dict[str, str]) -> dict[str, Any]:
        return {"index": delta.choice, "delta": content, **self._rest(delta)}

    def _rest(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._texts.chat(delta.logprobs) if self._logprobs and delta.logprobs else None
        rest: dict[str, Any] = {"logprobs": logprobs, "finish_reason": delta.finish}
        return rest | ({"routed_experts": delta.routed_experts} if self._routed_experts else {})


async def prepare(service: Service, wanted: ChatRequest) -> Prepared:
    """The prompt that the template makes.

    Raises:
        RequestError: a model without a chat template, or a prompt that leaves no room for an answer.
        ChatError: messages that the template does not take.
    """
    ids = await run_in_threadpool(conversation_ids, service, wanted.conversation)
    return Prepared([ids], wanted.settings, ChatShape(service.texts, wanted.settings), [], chat=True)


def conversation_ids(service: Service, conversation: Conversation) -> list[int]:
    if service.chat is None:
        raise RequestError("this model has no chat template: use /v1/completions", "messages")
    return service.chat.token_ids(
        conversation.messages,
        conversation.add_generation_prompt,
        conversation.continue_final_message,
        **conversation.extra,
    )
