"""The routes, who may use them, and how errors are answered."""

import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from importlib.resources import files
from typing import Any, NoReturn

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dsv3_jax.errors import UserError
from dsv3_jax.inference.server import chat_completions, completions
from dsv3_jax.inference.server.errors import (
    FAILED,
    NOT_FOUND,
    STOPPING,
    TOO_LARGE,
    UNAUTHORIZED,
    RequestError,
)
from dsv3_jax.inference.server.fields import Fields
from dsv3_jax.inference.server.metrics import CountingRequests, acceptance, tokens_per_pass
from dsv3_jax.inference.server.protocol import chat_request, completion_request, conversation, token_ids
from dsv3_jax.inference.server.replies import CLIENT_GONE, Envelope, reply
from dsv3_jax.inference.server.service import Prepared, Service, after
from dsv3_jax.inference.server.streams import Delta

Handler = Callable[[Service, Request], Awaitable[Response]]
WRONG_TYPE = 415
# The page at / and what it loads.
PAGE = {
    "index.html": "text/html",
    "style.css": "text/css",
    "chat.js": "text/javascript",
    "experts.js": "text/javascript",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self'; "
    "img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def make_app(service: Service) -> ASGIApp:
    """The server as an ASGI app. Whoever makes it runs the engine."""
    page = {name: files(__package__).joinpath("page", name).read_text(encoding="utf-8") for name in PAGE}

    async def show_page(service: Service, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in PAGE:
            raise RequestError(f"the page has no {name!r}", status=NOT_FOUND, code="unknown_url")
        return Response(page[name], headers=PAGE_HEADERS, media_type=PAGE[name])

    def route(path: str, method: str, handler: Handler, public: bool = False) -> Route:
        return Route(path, partial(_answer, service, handler, public), methods=[method])

    routes = [
        route("/", "GET", show_page, public=True),
        route("/page/{name}", "GET", show_page, public=True),
        route("/health", "GET", health, public=True),
        route("/metrics", "GET", metrics),
        route("/statistics", "GET", statistics),
        route("/v1/models", "GET", models),
        route("/v1/models/{name:path}", "GET", model),
        route("/v1/completions", "POST", complete),
        route("/v1/chat/completions", "POST", chat),
        route("/tokenize", "POST", tokenize),
        route("/detokenize", "POST", detokenize),
        route("/tokenizer_info", "GET", tokenizer_info),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route, Exception: _bug})
    return CountingRequests(app, service.metrics, frozenset(route.path for route in routes))


async def complete(service: Service, request: Request) -> Response:
    wanted = completion_request(await _json(service, request), service.name, service.texts.known)
    return await _generate(service, request, await completions.prepare(service, wanted))


async def chat(service: Service, request: Request) -> Response:
    wanted = chat_request(await _json(service, request), service.name, service.texts.known)
    return await _generate(service, request, await chat_completions.prepare(service, wanted))


async def _generate(service: Service, request: Request, prepared: Prepared) -> Response:
    start, settings = time.perf_counter(), prepared.settings
    if settings.max_tokens == 0:
        for prompt in prepared.prompts:
            service.check_room(prompt, 0)
        deltas, at_end = completions.nothing_generated(prepared.choices), _nothing
    else:
        generation = await service.started(prepared)
        deltas, at_end = _timed(service, generation.deltas(), start), partial(service.end, generation)
    tokens = sum(map(len, prepared.prompts))
    envelope = Envelope(prepared.shape, service.name, tokens, prepared.choices)
    deltas = after(prepared.echoed, deltas)
    return await reply(request, envelope, deltas, at_end, settings.stream, settings.include_usage)


async def _timed(service: Service, deltas: AsyncIterator[Delta], start: float) -> AsyncIterator[Delta]:
    first = True
    async for delta in deltas:
        if first:
            service.metrics.first_token_seconds.observe(time.perf_counter() - start)
            first = False
        yield delta


def _nothing() -> None:
    pass


async def models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(service)]})


async def model(service: Service, request: Request) -> Response:
    if request.path_params["name"] != service.name:
        raise RequestError(f"there is only {service.name!r}", "model", status=NOT_FOUND, code="model_not_found")
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "dsv3_jax",
        "max_model_len": service.context,
        "routing": service.routing,
    }


async def tokenize(service: Service, request: Request) -> Response:
    """{"prompt": text} or {"messages": [...]} as ids; "add_special_tokens" as in completions.

    A prompt that is nothing but the spelling of a special token is that token: how clients ask for its id.
    """
    fields = Fields(await _json(service, request))
    prompt = fields.text("prompt")
    add_special_tokens = fields.flag("add_special_tokens", True)
    if prompt is None:
        ids = await run_in_threadpool(chat_completions.conversation_ids, service, conversation(fields))
    elif prompt in service.texts.special and not add_special_tokens:
        ids = [service.texts.special[prompt]]
    else:
        ids = await run_in_threadpool(completions.encode_prompt, service, prompt, add_special_tokens)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.context})


async def detokenize(service: Service, request: Request) -> Response:
    """{"tokens": ids} as {"prompt": text}, special tokens spelled out."""
    fields = Fields(await _json(service, request))
    ids = token_ids(fields, "tokens", fields.get("tokens"), service.texts.known)
    return JSONResponse({"prompt": service.tokenizer.decode(ids, skip_special_tokens=False)})


async def tokenizer_info(service: Service, request: Request) -> Response:
    """What lm-eval asks for before it leaves the tokenizing to a server."""
    return JSONResponse(service.special_texts | {"chat_template": service.chat.source if service.chat else None})


async def health(service: Service, request: Request) -> Response:
    if service.failure is not None:
        raise RequestError(service.failure, status=STOPPING)
    return JSONResponse({"status": "ok"})


async def metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def statistics(service: Service, request: Request) -> Response:
    """The engine's own counters, for the page."""
    now = service.engine.statistics()
    shares = {"tokens_per_pass": tokens_per_pass(now), "acceptance": acceptance(now)}
    return JSONResponse(now._asdict() | shares)


async def _answer(service: Service, handler: Handler, public: bool, request: Request) -> Response:
    try:
        if not public:
            _authorize(service, request)
        return await handler(service, request)
    except RequestError as error:
        return error.response()
    except UserError as error:  # a chat template that refuses, above all
        return RequestError(str(error)).response()
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)


def _authorize(service: Service, request: Request) -> None:
    if not service.api_keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers arrive as bytes that are read as Latin-1.
    same = [hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) for key in service.api_keys]
    if scheme.lower() != "bearer" or not any(same):
        message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
        raise RequestError(message, status=UNAUTHORIZED, code="invalid_api_key")


async def _json(service: Service, request: Request) -> Any:
    """The body. Other types than JSON are refused: a browser sends those to a server that never asked for it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("the body must be JSON, with 'Content-Type: application/json'", status=WRONG_TYPE)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > service.most_bytes:
            message = f"the body has more than {service.most_bytes:,} bytes"
            # What is left of it is not read.
            raise RequestError(message, status=TOO_LARGE)
    try:
        return json.loads(bytes(body), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        problem = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON: {error}"
        raise RequestError(f"the body {problem}", code="invalid_json") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path} is not a route of this server"
    response = RequestError(message, status=error.status_code, code="unknown_url").response()
    response.headers.update(error.headers or {})
    return response


async def _bug(request: Request, error: Exception) -> Response:
    return RequestError("the server has made a mistake; its log tells more", status=FAILED).response()
