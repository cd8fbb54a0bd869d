"""Every route of the server, its replies whole and streamed, over a fake engine."""

import json

import pytest

from dsv3_jax.data.tokenizer import encode
from dsv3_jax.inference.completion import prompt_ids

ANSWER = "naïve 漢字🙂"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def chunks(response) -> list[dict]:
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_text_is_continued(client, engine, tokenizer):
    made = client.post("/v1/completions", json={"model": "small", "prompt": "def", "max_tokens": 50}).json()
    assert made["object"] == "text_completion" and made["id"].startswith("cmpl-") and made["model"] == "small"
    assert made["choices"] == [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}]
    prompt, tokens = prompt_ids(tokenizer, "def"), len(engine.answer)
    assert made["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": tokens,
        "total_tokens": len(prompt) + tokens,
    }
    assert engine.requests[0].token_ids == prompt
    # OpenAI's defaults: the model's own distribution, and 16 tokens.
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    client.post("/v1/completions", json={"prompt": "def"})
    assert engine.requests[1].max_new_tokens == 16
    assert engine.requests[1].sampling.seed != sampling.seed


@pytest.mark.parametrize(
    ("prompt", "count"), [("def", 1), (["def", "x"], 2), ([12, 13, 14], 1), ([[12, 13], [14]], 2), ([[12]], 1)]
)
def test_prompts_of_every_kind(client, engine, tokenizer, prompt, count):
    made = client.post("/v1/completions", json={"prompt": prompt, "n": 2, "seed": 7}).json()
    assert [choice["index"] for choice in made["choices"]] == list(range(2 * count))
    assert [request.sample_index for request in engine.requests] == list(range(2 * count))
    assert {request.sampling.seed for request in engine.requests} == {7}
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    wanted = [prompt_ids(tokenizer, one) if isinstance(one, str) else one for one in prompts for _ in range(2)]
    assert [request.token_ids for request in engine.requests] == wanted
    assert made["usage"]["prompt_tokens"] == sum(map(len, wanted)) // 2


def test_sampling_settings_reach_the_engine(client, engine):
    settings = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "seed": -1,
    }
    assert client.post("/v1/completions", json={"prompt": "x", **settings, "top_k": -1}).status_code == 200
    client.post("/v1/completions", json={"prompt": "x", **settings, "stop_token_ids": [20]})
    assert [request.sampling.top_k for request in engine.requests] == [0, 3]
    request = engine.requests[1]
    assert request.sampling.seed == 2**32 - 1 and request.stop_ids == {engine.end, 20}
    for name in settings.keys() - {"seed"}:
        assert getattr(request.sampling, name) == settings[name]


@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_text_and_the_request(client, engine, piece, stream):
    engine.piece = piece
    body = {"prompt": "x", "stop": ["漢", "zzz"], "stream": stream, "max_tokens": 50}
    response = client.post("/v1/completions", json=body)
    choices = [made["choices"][0] for made in (chunks(response) if stream else [response.json()])]
    assert "".join(choice["text"] for choice in choices) == "naïve "
    assert choices[-1]["finish_reason"] == "stop"
    assert engine.cancelled == ([] if piece == 100 else [0])
    included = client.post("/v1/completions", json={**body, "stream": False, "include_stop_str_in_output": True})
    assert included.json()["choices"][0]["text"] == "naïve 漢"


def test_an_ordinary_token_that_ends_a_text_is_no_part_of_it(client, engine, tokenizer):
    last = engine.answer[1]
    made = client.post("/v1/completions", json={"prompt": "x", "stop_token_ids": [last], "logprobs": 0}).json()
    assert made["choices"][0]["text"] == tokenizer.decode(engine.answer[:1])
    assert len(made["choices"][0]["logprobs"]["tokens"]) == 2


def test_log_probabilities_of_a_text_in_the_legacy_shape(client, engine, tokenizer):
    made = client.post("/v1/completions", json={"prompt": "def", "logprobs": 2, "max_tokens": 50}).json()
    choice = made["choices"][0]
    logprobs = choice["logprobs"]
    count = len(engine.answer)
    assert {name: len(values) for name, values in logprobs.items()} == dict.fromkeys(
        ["tokens", "token_logprobs", "top_logprobs", "text_offset"], count
    )
    assert logprobs["tokens"][-1] == "<｜end▁of▁sentence｜>" and logprobs["text_offset"][-1] == len(ANSWER)
    assert set(logprobs["token_logprobs"]) == {-0.5}
    for token, alternatives in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert alternatives == {token: -0.5, tokenizer.id_to_token(5): -2.0}
    whole = [token for token in logprobs["tokens"] if not token.startswith("bytes:")]
    assert whole[0] in ANSWER


def test_echo_scores_the_prompt(client, engine, tokenizer):
    ids = encode(tokenizer, "déjà vu")
    body = {"prompt": [ids], "echo": True, "logprobs": 1}
    made = client.post("/v1/completions", json={**body, "max_tokens": 0}).json()
    choice = made["choices"][0]
    assert (choice["text"], choice["finish_reason"], made["usage"]["completion_tokens"]) == ("déjà vu", "length", 0)
    assert not engine.requests
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None, *[-1.0 - index for index in range(len(ids) - 1)]]
    assert logprobs["top_logprobs"][0] is None
    # The token itself is there even where others are more probable; of two entries of one token the first counts.
    assert logprobs["top_logprobs"][1] == {logprobs["tokens"][1]: -0.25}
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or "déjà vu"[offset:].startswith(token)
    more = client.post("/v1/completions", json={**body, "max_tokens": 1}).json()["choices"][0]
    assert len(more["logprobs"]["tokens"]) == len(ids) + 1
    assert more["text"] == "déjà vu" + tokenizer.decode(engine.answer[:1])
    streamed = chunks(client.post("/v1/completions", json={**body, "max_tokens": 1, "stream": True}))
    assert "".join(made["choices"][0]["text"] for made in streamed) == more["text"]
    offsets = [offset for made in streamed for offset in made["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == more["logprobs"]["text_offset"]


def test_a_streamed_text(client, engine):
    body = {"prompt": ["x", "y"], "stream": True, "max_tokens": 50, "logprobs": 0}
    made = chunks(client.post("/v1/completions", json=body))
    for index in range(2):
        of_choice = [one["choices"][0] for one in made if one["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in of_choice) == ANSWER
        assert [choice["finish_reason"] for choice in of_choice] == [None] * (len(of_choice) - 1) + ["stop"]
        assert sum(len(choice["logprobs"]["tokens"]) for choice in of_choice) == len(engine.answer)
    assert len({one["id"] for one in made}) == 1 and "usage" not in made[0]
    made = chunks(client.post("/v1/completions", json={**body, "stream_options": {"include_usage": True}}))
    assert made[-1]["choices"] == [] and made[-1]["usage"]["completion_tokens"] == 2 * len(engine.answer)
    assert all(one["usage"] is None for one in made[:-1])


def test_a_chat(client, engine, service):
    made = client.post("/v1/chat/completions", json=CHAT).json()
    message = {"role": "assistant", "content": ANSWER, "refusal": None}
    assert made["object"] == "chat.completion" and made["id"].startswith("chatcmpl-")
    assert made["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    prompt = service.chat.token_ids(CHAT["messages"])
    assert engine.requests[0].token_ids == prompt
    assert engine.requests[0].max_new_tokens == service.context - len(prompt)
    for name in ("max_tokens", "max_completion_tokens"):
        made = client.post("/v1/chat/completions", json={**CHAT, name: 1, "n": 3}).json()
        assert [choice["finish_reason"] for choice in made["choices"]] == ["length"] * 3
        assert made["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("share", "most"), [(60, lambda prompt: 60 - prompt), (40, lambda _: 10), (1, lambda _: 1), (10**6, None)]
)
def test_an_answer_of_no_given_length_leaves_room_for_others(client, engine, service, share, most):
    messages = [{"role": "user", "content": "z" * 40}]
    prompt = len(service.chat.token_ids(messages))
    assert 40 < prompt < 50
    service.share = share
    assert client.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    assert engine.requests[-1].max_new_tokens == (most(prompt) if most else service.context - prompt)


def test_a_chat_that_thinks(client, engine, tokenizer, service):
    opening, closing = (tokenizer.token_to_id(tag) for tag in ("<think>", "</think>"))
    engine.answer = [opening, *encode(tokenizer, "x = é"), closing, *encode(tokenizer, ANSWER), engine.end]
    message = client.post("/v1/chat/completions", json={**CHAT, "stop": "é"}).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("x = é", ANSWER)
    made = chunks(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    deltas = [one["choices"][0]["delta"] for one in made]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "x = é"
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
    engine.answer = engine.answer[1:]
    thinking = {**CHAT, "chat_template_kwargs": {"thinking": True}}
    message = client.post("/v1/chat/completions", json=thinking).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "x = é"


def test_log_probabilities_of_a_chat(client, engine):
    body = {**CHAT, "logprobs": True, "top_logprobs": 2}
    content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content[:-1]).decode() == ANSWER
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(engine.answer)
    streamed = chunks(client.post("/v1/chat/completions", json={**body, "stream": True}))
    found = [one["choices"][0]["logprobs"] for one in streamed]
    assert [entry for logprobs in found if logprobs for entry in logprobs["content"]] == content
    plain = client.post("/v1/chat/completions", json={**CHAT, "logprobs": True}).json()
    assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_experts_of_a_reply_and_in_a_stream_each_token_with_its_text(client, engine, tokenizer, path, piece):
    engine.piece = piece
    prompt = {"prompt": "x", "max_tokens": 50} if path == "/v1/completions" else CHAT
    body = {**prompt, "routed_experts": True, "n": 2}
    wanted = [[[token % 7, token % 5], [token % 3, token % 2]] for token in engine.answer]
    for choice in client.post(path, json=body).json()["choices"]:
        assert choice["routed_experts"] == wanted
    made = chunks(client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}}))
    assert made[-1]["choices"] == [] and made[-1]["usage"]["completion_tokens"] == 2 * len(wanted)
    choices = [one["choices"][0] for one in made[:-1] if one["choices"][0]["index"] == 0]
    of_tokens = [choice for choice in choices if choice["routed_experts"]]
    assert [choice["routed_experts"] for choice in of_tokens] == [[experts] for experts in wanted]
    texts = [choice.get("text", choice.get("delta", {}).get("content", "")) for choice in of_tokens]
    # A token that ends within a character has no text yet, and the end token has none at all.
    assert "".join(texts) == ANSWER and texts[-1] == "" and "" in texts[:-1]
    for place in range(len(texts) - 1):
        so_far = tokenizer.decode(engine.answer[: place + 1])
        assert (texts[place] == "") if so_far.endswith("\ufffd") else ("".join(texts[: place + 1]) == so_far)
    assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("piece", [1, 100])
@pytest.mark.parametrize("stream", [False, True])
def test_experts_are_told_up_to_the_token_that_ends_the_text(client, engine, tokenizer, stream, piece):
    """And of tokens whose text is held back, which could be the beginning of a stop string."""
    engine.piece = piece
    body = {"prompt": ["x"], "stop": ["字🙂!", "漢"], "routed_experts": True, "logprobs": 0, "stream": stream}
    response = client.post("/v1/completions", json={**body, "max_tokens": 50})
    choices = [made["choices"][0] for made in (chunks(response) if stream else [response.json()])]
    count = next(n for n in range(len(engine.answer)) if "漢" in tokenizer.decode(engine.answer[:n]))
    assert sum(len(choice["routed_experts"]) for choice in choices) == count
    for choice in choices:
        assert len(choice["routed_experts"]) == len(choice["logprobs"]["tokens"])
    assert choices[-1]["finish_reason"] == "stop" and engine.cancelled == ([] if piece == 100 else [0])
    plain = client.post("/v1/completions", json={"prompt": "x", "echo": True}).json()["choices"][0]
    assert "routed_experts" not in plain and plain["text"].startswith("x")


def test_nothing_generated_has_no_experts(client):
    body = {"prompt": "x", "max_tokens": 0, "echo": True, "routed_experts": True}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["routed_experts"] == []


def test_an_answer_begun_by_the_client_is_continued(client, engine, service):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "so"}]
    client.post("/v1/chat/completions", json={"messages": messages, "continue_final_message": True})
    assert engine.requests[0].token_ids == service.chat.token_ids(messages, continue_final_message=True)


def test_tokens_of_texts_and_back(client, tokenizer, service):
    ids = encode(tokenizer, ANSWER)
    made = client.post("/tokenize", json={"prompt": ANSWER, "add_special_tokens": False}).json()
    assert made == {"tokens": ids, "count": len(ids), "max_model_len": service.context}
    assert client.post("/tokenize", json={"prompt": ANSWER}).json()["tokens"] == prompt_ids(tokenizer, ANSWER)
    assert client.post("/tokenize", json=CHAT).json()["tokens"] == service.chat.token_ids(CHAT["messages"])
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": ANSWER}
    info = client.get("/tokenizer_info").json()
    found = client.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()
    assert found["tokens"] == [1] and info["chat_template"] == service.chat.source


def test_what_there_is_to_know(client, service):
    made = client.get("/v1/models").json()
    assert [model["id"] for model in made["data"]] == ["small"] and made["object"] == "list"
    assert client.get("/v1/models/small").json() == made["data"][0]
    assert made["data"][0]["routing"] == service.routing
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/statistics").json()["tokens_per_pass"] == 1.75
    page = client.get("/")
    assert "<!DOCTYPE html>" in page.text and page.headers["content-type"] == "text/html; charset=utf-8"
    parts = {part: client.get(f"/page/{part}") for part in ("style.css", "chat.js", "experts.js")}
    assert all(f"page/{part}" in page.text for part in ("style.css", "chat.js"))
    for part in (page, *parts.values()):
        assert part.status_code == 200 and "http://" not in part.text and "https://" not in part.text
        assert "default-src 'none'" in part.headers["content-security-policy"]
    assert parts["chat.js"].headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.get("/page/app.py").status_code == 404
    service.fail("the engine has failed")
    assert client.get("/health").status_code == 503
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503


def test_metrics(client):
    client.post("/v1/completions", json={"prompt": "x"})
    client.post("/v1/completions", json={"prompt": 5})
    client.get("/somewhere")
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'dsv3_jax_requests_total{route="/v1/completions",status="200"} 1.0',
        'dsv3_jax_requests_total{route="/v1/completions",status="400"} 1.0',
        'dsv3_jax_requests_total{route="other",status="404"} 1.0',
        'dsv3_jax_request_seconds_count{route="/v1/completions"} 2.0',
        "dsv3_jax_first_token_seconds_count 1.0",
        'dsv3_jax_cache_pages{state="cached"} 5.0',
        "dsv3_jax_generated_tokens_total 70.0",
        'dsv3_jax_accepted_drafts_total{depth="2"} 10.0',
        'dsv3_jax_draft_acceptance{depth="1"} 0.5',
        "dsv3_jax_tokens_per_pass 1.75",
    ):
        assert line in lines
