"""Requests that cannot be answered: the right status, OpenAI's shape, and a message that names what is wrong."""

import json

import pytest

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
JSON = {"Content-Type": "application/json"}


def refusal(response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"] and "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "part"),
    [
        (TEXT, {}, "prompt", "is missing"),
        (TEXT, {"prompt": None}, "prompt", "is missing"),
        (TEXT, {"prompt": 5}, "prompt", "not 5"),
        (TEXT, {"prompt": {}}, "prompt", "not an object"),
        (TEXT, {"prompt": []}, "prompt", "is an empty list"),
        (TEXT, {"prompt": [[]]}, "prompt[0]", "at least one token id"),
        (TEXT, {"prompt": ["x", 5]}, "prompt[1]", "must be a text"),
        (TEXT, {"prompt": [1, "x"]}, "prompt[1]", "must be the id of a token"),
        (TEXT, {"prompt": [-1]}, "prompt[0]", "not -1"),
        (TEXT, {"prompt": [[1, 310]]}, "prompt[0][1]", "not 310"),
        (TEXT, {"prompt": [True]}, "prompt[0]", "not true"),
        (TEXT, {"prompt": [1.0]}, "prompt[0]", "not 1.0"),
        (TEXT, {"prompt": [10**100]}, "prompt[0]", "a number that large"),
        (TEXT, {"prompt": "", "add_special_tokens": False}, "prompt", "is empty"),
        (TEXT, {"prompt": "x" * 300}, "max_tokens", "the model's context has 200"),
        (TEXT, {"prompt": "x", "max_tokens": 199}, "max_tokens", "2 tokens of prompt and max_tokens=199 do not fit"),
        (TEXT, {"prompt": "x" * 300, "max_tokens": 0}, None, "the model's context has 200"),
        (TEXT, {"prompt": "x", "max_tokens": -1}, "max_tokens", "between 0 and"),
        (TEXT, {"prompt": "x", "max_tokens": 10**50}, "max_tokens", "a number that large"),
        (TEXT, {"prompt": "x", "max_tokens": 1.5}, "max_tokens", "a whole number, not 1.5"),
        (TEXT, {"prompt": "x", "max_tokens": True}, "max_tokens", "not true"),
        (TEXT, {"prompt": "x", "n": 0}, "n", "between 1 and"),
        (TEXT, {"prompt": ["x"] * 1000, "n": 100}, "n", "100000 choices"),
        (TEXT, {"prompt": ["x"] * 2000}, "prompt", "2000 prompts"),
        (TEXT, {"prompt": "x", "best_of": 3}, "best_of", "is not supported"),
        (TEXT, {"prompt": "x", "logprobs": 21}, "logprobs", "between 0 and 20"),
        (TEXT, {"prompt": "x", "logprobs": True}, "logprobs", "not true"),
        (TEXT, {"prompt": "x", "echo": "yes"}, "echo", "true or false, not 'yes'"),
        (TEXT, {"prompt": "x", "temperature": -1}, "temperature", "at least 0"),
        (TEXT, {"prompt": "x", "temperature": "1"}, "temperature", "must be a number"),
        (TEXT, {"prompt": "x", "temperature": 10**400}, "temperature", "is too large"),
        (TEXT, {"prompt": "x", "top_p": 0}, "top_p", "above 0"),
        (TEXT, {"prompt": "x", "top_k": -2}, "top_k", "between -1 and"),
        (TEXT, {"prompt": "x", "presence_penalty": 3}, "presence_penalty", "between -2 and 2"),
        (TEXT, {"prompt": "x", "seed": 1.5}, "seed", "a whole number"),
        (TEXT, {"prompt": "x", "stop": ""}, "stop", "1 to 1000 characters"),
        (TEXT, {"prompt": "x", "stop": [1]}, "stop", "must be a text"),
        (TEXT, {"prompt": "x", "stop": ["x"] * 65}, "stop", "65 texts"),
        (TEXT, {"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids[0]", "the id of a token"),
        (TEXT, {"prompt": "x", "stop_token_ids": 5}, "stop_token_ids", "must be a list"),
        (TEXT, {"prompt": "x", "routed_experts": 1}, "routed_experts", "true or false, not 1"),
        (CHAT, {"messages": HI, "return_routed_experts": True}, "return_routed_experts", "is not supported"),
        (TEXT, {"prompt": "x", "stream": 1}, "stream", "true or false"),
        (TEXT, {"prompt": "x", "stream_options": {}}, "stream_options", "needs stream"),
        (TEXT, {"prompt": "x", "stream": True, "stream_options": 3}, "stream_options", "must be a JSON object"),
        (TEXT, {"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias", "is not supported"),
        (TEXT, {"prompt": "x", "suffix": "y"}, "suffix", "is not supported"),
        (TEXT, [], None, "must be a JSON object, not a list"),
        (CHAT, {}, "messages", "is missing"),
        (CHAT, {"messages": []}, None, "a list of at least one"),
        (CHAT, {"messages": [5]}, None, "messages[0]"),
        (CHAT, {"messages": [{"role": "nobody"}]}, None, "messages[0].role"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, None, "no format for tools"),
        (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools", "is not supported"),
        (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        (CHAT, {"messages": HI, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens", "between 1 and"),
        (CHAT, {"messages": HI, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "cannot contain"),
        (CHAT, {"messages": HI, "chat_template_kwargs": {"bos_token": 1}}, None, "bos_token cannot be given"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}, None, "leave no room for an answer"),
        ("/tokenize", {}, "messages", "is missing"),
        ("/detokenize", {"tokens": "x"}, "tokens", "must be a list"),
        ("/detokenize", {"tokens": [10**9]}, "tokens[0]", "the id of a token"),
    ],
)
def test_a_field_that_is_wrong_is_named(client, engine, path, body, param, part):
    error = refusal(client.post(path, json=body), 400)
    assert part in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"
    assert not engine.requests


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"prompt": "x"} more',
        b'{"prompt": "\xff"}',
        b'{"prompt": "x", "temperature": NaN}',
        b"[" * 100_000,
        b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}",
        b'{"prompt": "half a pair \\ud83d"}',
        b'{"prompt": "x", "stop": "\\ud83d"}',
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
    ],
)
@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_body_that_is_not_json_or_no_text(client, engine, content, path):
    refusal(client.post(path, content=content, headers=JSON), 400)
    assert not engine.requests


def test_fields_that_nobody_knows_or_that_change_nothing_are_ignored(client):
    body = {"prompt": "x", "user": "me", "foo": [1], "logit_bias": {}, "best_of": 1, "suffix": None, "stop": None}
    assert client.post(TEXT, json=body).status_code == 200
    body = {"messages": HI, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": True}
    assert client.post(CHAT, json=body).status_code == 200


def test_what_is_not_there(client):
    for path, body in ((TEXT, {"prompt": "x"}), (CHAT, {"messages": HI})):
        error = refusal(client.post(path, json={**body, "model": "gpt-4"}), 404)
        assert error["code"] == "model_not_found" and "'gpt-4' does not exist; there is 'small'" in error["message"]
    refusal(client.get("/v1/models/gpt-4"), 404)
    refusal(client.get("/v1/nothing"), 404)
    refusal(client.get(TEXT), 405)


def test_bodies_are_bounded_and_say_that_they_are_json(client, service, engine):
    service.most_bytes = 1000
    refusal(client.post(TEXT, json={"prompt": "x" * 1000}), 413)
    content = json.dumps({"prompt": "x"})
    refusal(client.post(TEXT, content=content, headers={"Content-Type": "text/plain"}), 415)
    refusal(client.post(TEXT, content=content), 415)
    assert not engine.requests
    assert client.post(TEXT, content=content, headers={"Content-Type": "application/JSON; charset=utf-8"}).is_success


def test_a_key(client, service):
    service.api_keys = ("other", "sécret")
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer secret"}, {"Authorization": "sécret"}):
        encoded = {name: value.encode() for name, value in headers.items()}
        for method, path in (("GET", "/v1/models"), ("POST", TEXT), ("POST", "/tokenize"), ("GET", "/metrics")):
            assert refusal(client.request(method, path, headers=encoded), 401)["code"] == "invalid_api_key"
    for key in service.api_keys:
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode()}).status_code == 200
    assert client.get("/health").status_code == client.get("/").status_code == 200


def test_a_full_queue_takes_all_of_a_request_or_nothing(client, engine):
    engine.room = 0
    response = client.post(TEXT, json={"prompt": "x"})
    assert refusal(response, 429)["code"] == "queue_full" and response.headers["retry-after"] == "1"
    engine.room, engine.piece = 2, 0
    refusal(client.post(TEXT, json={"prompt": "x", "n": 5}), 429)
    assert sorted(engine.cancelled) == sorted(range(len(engine.requests)))


def test_what_the_engine_refuses_or_fails_at(client, engine, service):
    service.context = 10**6
    error = refusal(client.post(TEXT, json={"prompt": "x", "max_tokens": 500}), 400)
    assert error["message"] == "the fake engine has no room"
    engine.error = "the model's logits are NaN"
    error = refusal(client.post(TEXT, json={"prompt": "x"}), 500)
    assert (error["message"], error["type"]) == ("the model's logits are NaN", "server_error")
    lines = client.post(TEXT, json={"prompt": "x", "stream": True}).text.split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: ")) == {"error": error}


def test_a_model_without_chats_or_scores(client, service):
    service.chat = service.score = None
    assert "no chat template" in refusal(client.post(CHAT, json={"messages": HI}), 400)["message"]
    assert refusal(client.post(TEXT, json={"prompt": "x", "echo": True, "logprobs": 1}), 400)["param"] == "echo"
    assert client.post(TEXT, json={"prompt": "x", "echo": True}).json()["choices"][0]["text"].startswith("xna")


def test_a_bug_is_a_reply_too(client, service):
    service.score = lambda ids, top: 1 / 0
    refusal(client.post(TEXT, json={"prompt": "x", "echo": True, "logprobs": 1}), 500)
