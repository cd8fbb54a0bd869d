"""A real server on a real port: the official client, many requests at once, clients that leave, and the end."""

import asyncio
import os
import signal
import socket
import time
from types import SimpleNamespace

import httpx2
import openai
import pytest

from dsv3_jax.errors import ArgumentError
from dsv3_jax.inference.server.running import bound, run

CHAT = [{"role": "user", "content": "hi"}]


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_official_client(address, service, engine):
    service.api_keys = ("key",)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0)
    assert [model.id for model in client.models.list()] == ["small"]
    made = client.chat.completions.create(model="small", messages=CHAT, logprobs=True, top_logprobs=1, n=2)
    assert [choice.message.content for choice in made.choices] == ["naïve 漢字🙂"] * 2
    assert made.choices[1].logprobs.content[0].top_logprobs[0].logprob == -0.5
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(model="small", messages=CHAT, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "naïve 漢字🙂"
    assert chunks[-1].choices[0].finish_reason == "stop" and last.usage.completion_tokens == len(engine.answer)
    made = client.completions.create(model="small", prompt=["x", "y"], max_tokens=3, logprobs=2, echo=True)
    assert made.choices[1].text.startswith("yna") and made.choices[1].logprobs.token_logprobs[0] is None
    pieces = client.completions.create(model="small", prompt="x", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "naïve 漢字🙂"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="small", messages=CHAT, temperature=-1)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    engine.error = "broken"
    with pytest.raises(openai.InternalServerError, match="broken"):
        client.completions.create(model="small", prompt="x")
    with pytest.raises(openai.APIError, match="broken"):
        list(client.completions.create(model="small", prompt="x", stream=True))


def test_two_hundred_at_once(address, engine):
    async def all_of_them():
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=address, limits=limits, timeout=300) as client:

            async def one(index):
                body = {"prompt": f"{index}", "max_tokens": 50, "stream": index % 2 == 0}
                return await client.post("/v1/completions", json=body)

            return await asyncio.gather(*map(one, range(200)))

    for index, response in enumerate(asyncio.run(all_of_them())):
        assert response.status_code == 200
        if index % 2:
            assert response.json()["choices"][0]["text"] == "naïve 漢字🙂"
        else:
            assert response.text.endswith("data: [DONE]\n\n")
    assert len(engine.requests) == 200 and not engine.cancelled


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(address, engine, service, stream):
    engine.piece = 0  # never ends by itself
    host, port = address.removeprefix("http://").split(":")
    body = f'{{"prompt": "x", "n": 3, "stream": {str(stream).lower()}}}'
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        until(lambda: len(engine.requests) == 3)
    until(lambda: sorted(engine.cancelled) == [0, 1, 2])
    until(lambda: not service.running)


def test_what_waits_for_an_engine_that_fails_is_told(address, engine, service):
    engine.piece = 0
    with httpx2.stream(
        "POST", f"{address}/v1/completions", json={"prompt": "x", "stream": True}, timeout=60
    ) as response:
        service.fail("the engine has failed")
        assert "the engine has failed" in response.read().decode()


def test_what_runs_when_the_server_ends_has_some_time_and_is_told(address, engine, server, caplog):
    engine.piece = 0
    with httpx2.stream(
        "POST", f"{address}/v1/completions", json={"prompt": "x", "stream": True}, timeout=60
    ) as response:
        start = time.monotonic()
        server.should_exit = True
        assert "the engine has stopped" in response.read().decode()
        assert time.monotonic() - start >= 0.2  # seconds_to_end of the fixture
    assert not caplog.records


def test_an_address_in_use_is_one_line(address):
    port = int(address.rpartition(":")[2])
    with pytest.raises(ArgumentError, match=f"--port={port} cannot be had"):
        bound("127.0.0.1", port)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_nothing_else(service, capsys, number):
    before = signal.getsignal(number)

    def run_engine(stop):
        os.kill(os.getpid(), number)
        assert stop.wait(timeout=60)

    run(service, SimpleNamespace(run=run_engine), bound("127.0.0.1", 0))
    assert signal.getsignal(number) is before
    assert service.failure is None
    assert capsys.readouterr().out.startswith("small at http://127.0.0.1:")


def test_an_engine_that_fails_ends_the_server(service, capsys):
    with pytest.raises(SystemExit) as caught:
        run(service, SimpleNamespace(run=lambda stop: 1 / 0), bound("127.0.0.1", 0))
    assert caught.value.code == 1 and "ZeroDivisionError" in capsys.readouterr().err
