"""The deltas of a generation as one reply, or as a stream of server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dsv3_jax.inference.server.errors import RequestError
from dsv3_jax.inference.server.streams import Delta

CLIENT_GONE = 499  # nginx' number; nobody reads it but the metrics
LAST_EVENT = "data: [DONE]\n\n"


class Shape(Protocol):
    """How a route writes its choices."""

    prefix: str
    """Of a reply's id."""
    whole: str
    """The name of a reply's kind, and of a chunk's."""
    chunk: str

    def choice(self, delta: Delta) -> dict[str, Any]:
        """A whole choice, all its deltas put together."""
        ...

    def opening(self, choice: int) -> list[dict[str, Any]]:
        """What a choice begins with in a stream."""
        ...

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """A delta as choices of chunks."""
        ...


class Envelope:
    """What every reply has around its choices."""

    def __init__(self, shape: Shape, model: str, prompt_tokens: int, choices: int):
        self._shape, self._model = shape, model
        self._prompt_tokens, self._choices = prompt_tokens, choices
        self._id, self._created = f"{shape.prefix}-{uuid.uuid4().hex}", int(time.time())

    async def whole(self, deltas: AsyncIterator[Delta]) -> dict[str, Any]:
        parts: list[list[Delta]] = [[] for _ in range(self._choices)]
        async for delta in deltas:
            parts[delta.choice].append(delta)
        complete = [joined(choice, of_choice) for choice, of_choice in enumerate(parts)]
        choices = [self._shape.choice(delta) for delta in complete]
        return self._around(self._shape.whole, choices) | {"usage": self._usage(sum(d.tokens for d in complete))}

    async def events(self, deltas: AsyncIterator[Delta], include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events, one chunk each. An error after the first is an event, too, and the last."""
        nothing = {"usage": None} if include_usage else {}
        tokens = 0
        try:
            for choice in range(self._choices):
                for piece in self._shape.opening(choice):
                    yield event(self._around(self._shape.chunk, [piece]) | nothing)
            async for delta in deltas:
                tokens += delta.tokens
                for piece in self._shape.pieces(delta):
                    yield event(self._around(self._shape.chunk, [piece]) | nothing)
        except RequestError as error:
            yield event(error.body())
            return
        if include_usage:
            yield event(self._around(self._shape.chunk, []) | {"usage": self._usage(tokens)})
        yield LAST_EVENT

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        of_all = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return of_all | {"choices": choices}

    def _usage(self, tokens: int) -> dict[str, int]:
        total = self._prompt_tokens + tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": tokens, "total_tokens": total}


class EventStream(StreamingResponse):
    """A stream that always calls `at_end`: when it is through, has failed, or its client is gone."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


async def reply(
    request: Request,
    envelope: Envelope,
    deltas: AsyncIterator[Delta],
    at_end: Callable[[], None],
    stream: bool,
    include_usage: bool,
) -> Response:
    """The answer to a request whose body has been read.

    Args:
        at_end: called exactly when nobody waits for deltas any more, a client that left included.

    Raises:
        RequestError: of `deltas`, unless it is a stream, which ends with it.
    """
    if stream:
        return EventStream(envelope.events(deltas, include_usage), at_end)
    whole = asyncio.ensure_future(envelope.whole(deltas))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(whole.result())
    finally:
        whole.cancel()
        gone.cancel()
        at_end()


def joined(choice: int, parts: Sequence[Delta]) -> Delta:
    """All deltas of one choice as one."""
    return Delta(
        choice,
        "".join(part.text for part in parts),
        "".join(part.reasoning for part in parts),
        [token for part in parts for token in part.logprobs],
        [experts for part in parts for experts in part.routed_experts],
        sum(part.tokens for part in parts),
        parts[-1].finish if parts else None,
    )


def event(value: dict[str, Any]) -> str:
    # ASCII: some clients take U+2028 and its like for line ends, which JSON leaves as they are.
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
