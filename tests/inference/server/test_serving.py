"""infer.py --serve as a user starts it: a small model on disk, the engine itself, and the end by a signal."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

import infer
from configs.tiny import config as tiny
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.inference.arguments import parse_infer
from dsv3_jax.inference.chat import chat_template
from dsv3_jax.inference.completion import complete
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.server.serving import serve, special_texts
from dsv3_jax.inference.stopping import stop_ids
from dsv3_jax.loading import load
from dsv3_jax.model.functional import initialize
from dsv3_jax.training.checkpoint import Checkpoints

ROOT = Path(infer.__file__).parent


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "little"
    small = {"vocabulary": 320, "width": 32, "layers": 1, "dense_layers": 0, "experts": 8, "expert_ffn_width": 16}
    model = dataclasses.replace(tiny.model, **small, mtp_depth=1, maximum_positions=128)
    config = dataclasses.replace(tiny, model=model)
    parameters, router_bias = initialize(model, 0)
    checkpoints = Checkpoints(workdir / "checkpoints", config, train_tokenizer(["naïve text " * 50], 320).to_str())
    checkpoints.save(1, {"parameters": parameters, "router_bias": router_bias}, {})
    checkpoints.close()
    return workdir


@pytest.fixture
def served(workdir):
    options = ["--serve", "--port=0", "--api_key=key", "--slots=2", "--cache_tokens=300", "--speculative=1"]
    command = [sys.executable, "infer.py", f"--checkpoint={workdir}", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        yield process
        process.kill()


def test_a_server_answers_as_the_model_does_and_ends_when_it_is_asked_to(workdir, served):
    name, _, address = served.stdout.readline().strip().partition(" at ")
    assert name == "little" and address.startswith("http://127.0.0.1:")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0)
    model, _, tokenizer = load(workdir)
    greedy = Sampling(temperature=0)

    asked = {"model": name, "prompt": ["naïve", "text text"], "max_tokens": 20, "temperature": 0, "logprobs": 1}
    made = client.completions.create(**asked)
    expected = complete(model, tokenizer, asked["prompt"], greedy, 20)
    assert [choice.text for choice in made.choices] == [completion.text for completion in expected]

    # The text as a prompt scores as it did when it was generated.
    ids = [tokenizer.token_to_id("<｜begin▁of▁sentence｜>"), *tokenizer.encode("naïve").ids, *expected[0].token_ids]
    echoed = client.completions.create(model=name, prompt=[ids], max_tokens=0, echo=True, logprobs=1)
    scores = echoed.choices[0].logprobs.token_logprobs[-len(expected[0].token_ids) :]
    assert scores == pytest.approx(made.choices[0].logprobs.token_logprobs, abs=1e-3)

    messages = [{"role": "user", "content": "text"}]
    asked = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 20}
    chunks = [*client.chat.completions.create(**asked, stream=True, extra_body={"routed_experts": True})]
    shown = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert shown == complete(model, tokenizer, ["text"], greedy, 20, chat=chat_template(None, tokenizer))[0].text
    whole = client.chat.completions.create(**asked, extra_body={"routed_experts": True})
    routed = [experts for chunk in chunks for experts in chunk.choices[0].routed_experts]
    assert routed == whole.choices[0].routed_experts and len(routed) == whole.usage.completion_tokens
    assert {(len(of_layers), len(of_layers[0])) for of_layers in routed} == {(1, model.model.experts_per_token)}
    with pytest.raises(openai.BadRequestError, match="the model's context has 128"):
        client.chat.completions.create(model=name, messages=messages, max_tokens=125)

    endless = client.completions.create(model=name, prompt="text", max_tokens=120, stream=True)
    next(iter(endless))
    served.send_signal(signal.SIGTERM)
    out, error = served.communicate(timeout=120)
    assert (served.returncode, out, error) == (0, "", "")


def test_what_ends_a_text_and_what_the_tokens_are():
    tokenizer = train_tokenizer(["x"], 320)
    assert stop_ids(None, tokenizer) == stop_ids({}, tokenizer) == {1}
    for value, expected in ((3, {1, 3}), ([3, 4, 999, "x"], {1, 3, 4}), ("x", {1})):
        files = {"generation_config.json": json.dumps({"eos_token_id": value})}
        assert stop_ids(files, tokenizer) == expected
    assert stop_ids({"generation_config.json": "{"}, tokenizer) == {1}
    assert special_texts(tokenizer)["eos_token"] == "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--checkpoint=absent"], "absent holds no checkpoint"),
        (["--host=nowhere.invalid"], "--host=nowhere.invalid --port=0 cannot be had"),
        (["--speculative=5", "--cache_tokens=10"], "cache_tokens=10 must be at least page_size=64"),
    ],
)
def test_what_cannot_be_served_is_one_line(workdir, options, part, monkeypatch):
    monkeypatch.setattr("dsv3_jax.inference.server.serving.use_one_thread", lambda model: None)
    with pytest.raises(UserError) as caught:
        serve(parse_infer([f"--checkpoint={workdir}", "--serve", "--port=0", *options]))
    assert part in str(caught.value) and "\n" not in str(caught.value)
