"""infer.py: one run as a user starts it, and every mistake as one line."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import infer
from configs.tiny import config as tiny
from dsv3_jax.command_line import run_main
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import ArgumentError
from dsv3_jax.inference.arguments import OPTIONS, InferArguments, parse_infer
from dsv3_jax.inference.chat import chat_template
from dsv3_jax.inference.completion import complete
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.loading import load
from dsv3_jax.model.functional import initialize
from dsv3_jax.training.checkpoint import Checkpoints

ROOT = Path(infer.__file__).parent
GIVEN = ["--checkpoint=run", "--prompt=text"]
SERVING = ["--checkpoint=run", "--serve"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    small = {"vocabulary": 320, "width": 32, "layers": 1, "dense_layers": 0, "experts": 8, "expert_ffn_width": 16}
    model = dataclasses.replace(tiny.model, **small, mtp_depth=0, maximum_positions=128)
    config = dataclasses.replace(tiny, model=model)
    parameters, router_bias = initialize(model, 0)
    checkpoints = Checkpoints(workdir / "checkpoints", config, train_tokenizer(["naïve text " * 50], 320).to_str())
    checkpoints.save(1, {"parameters": parameters, "router_bias": router_bias}, {})
    checkpoints.close()
    return workdir


def run(argv: list[str], monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["infer.py", *argv])
    monkeypatch.setattr(infer, "set_up_compiler", lambda: None)
    monkeypatch.setattr(infer, "use_one_thread", lambda model: None)
    with pytest.raises(SystemExit) as caught:
        run_main(infer.main)
    return caught.value.code


def test_json_is_one_object_a_prompt(workdir):
    options = ["--checkpoint", str(workdir), "--prompt", "naïve", "--prompt=", "--max-new-tokens=20", "--json"]
    run = subprocess.run([sys.executable, "infer.py", *options], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    objects = [json.loads(line) for line in run.stdout.splitlines()]
    assert [made["prompt"] for made in objects] == ["naïve", ""]
    for made in objects:
        assert list(made) == [
            "prompt",
            "reasoning",
            "text",
            "token_ids",
            "tokens_per_second",
            "tokens_per_pass",
            "acceptance",
            "finish_reason",
        ]
        assert made["finish_reason"] == "stop" or len(made["token_ids"]) == 20
        assert isinstance(made["text"], str) and made["tokens_per_second"] > 0


def test_one_prompt_is_shown_with_its_continuation_and_several_under_headers(workdir, monkeypatch, capsys):
    options = [f"--checkpoint={workdir}", "--max_new_tokens=20", "--temperature=0"]
    model, _, tokenizer = load(workdir)
    texts = [made.text for made in complete(model, tokenizer, ["naïve", "text"], Sampling(temperature=0), 20)]
    assert run([*options, "--prompt=naïve"], monkeypatch) == 0
    assert capsys.readouterr().out == f"naïve{texts[0]}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("text"))
    assert run([*options, "--prompt=naïve", "--prompt=-"], monkeypatch) == 0
    expected = f"=== prompt 1 of 2 ===\nnaïve{texts[0]}\n=== prompt 2 of 2 ===\ntext{texts[1]}\n"
    assert capsys.readouterr().out == expected


def test_a_stop_text_ends_a_prompt_and_a_chat_has_the_answer_alone(workdir, monkeypatch, capsys):
    model, _, tokenizer = load(workdir)
    (whole,) = complete(model, tokenizer, ["naïve"], Sampling(temperature=0), 20)
    stop = whole.text[5:8]
    options = [f"--checkpoint={workdir}", "--prompt=naïve", "--max_new_tokens=20", "--temperature=0"]
    assert run([*options, f"--stop={stop}", "--stop=never"], monkeypatch) == 0
    before = whole.text[: whole.text.index(stop)]
    assert capsys.readouterr().out == f"naïve{before}\n"
    assert run([*options, f"--stop={stop}", "--json"], monkeypatch) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["text"], made["finish_reason"]) == (before, "stop")
    assert made["token_ids"] == whole.token_ids[: len(made["token_ids"])]
    template = chat_template(None, tokenizer)
    (answer,) = complete(model, tokenizer, ["naïve"], Sampling(temperature=0), 20, chat=template)
    assert run([*options, "--chat"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip("\n").endswith(answer.text.rstrip("\n")) and not shown.startswith("naïve")


def test_what_is_asked_for():
    assert parse_infer(GIVEN) == InferArguments(Path("run"), ("text",), 256, Sampling(0.8, 0, 0.95, 0), False)
    argv = "--checkpoint a --prompt b --prompt=c=d --max-new-tokens 5 --temperature=0 --top-k 7 --top_p=0.5 --seed 3"
    expected = InferArguments(Path("a"), ("b", "c=d"), 5, Sampling(0.0, 7, 0.5, 3), True)
    assert parse_infer([*argv.split(), "--json"]) == expected


def test_what_is_to_be_served():
    assert parse_infer(SERVING) == InferArguments(Path("run"), (), serve=True)
    asked = "--host 0.0.0.0 --port=0 --api-key=None --slots 2 --cache_tokens=640 --speculative=1".split()
    expected = InferArguments(Path("run"), (), speculative=1, serve=True, host="0.0.0.0", port=0, slots=2)
    assert parse_infer([*SERVING, *asked]) == dataclasses.replace(expected, api_key=("None",), cache_tokens=640)


@pytest.mark.parametrize("prompt", ["", "-5", "two words\nand a line", "--flag", "é🙂", "None", "'quoted'"])
def test_a_prompt_is_taken_as_it_is(prompt):
    assert parse_infer(["--checkpoint=run", f"--prompt={prompt}"]).prompt == (prompt,)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["--checkpoint=DIR is missing"]),
        (["--checkpoint=run"], ["--prompt=TEXT is missing"]),
        ([*GIVEN, "--temprature=1"], ["--temprature is not an option", "did you mean --temperature?"]),
        ([*GIVEN, "--max-new-token", "1"], ["--max_new_token ", "did you mean --max_new_tokens?"]),
        ([*GIVEN, "--zzz"], ["--zzz is not an option; --help"]),
        ([*GIVEN, "more"], ["'more' is not an option", "--name=value"]),
        ([*GIVEN, "--seed"], ["--seed needs a value"]),
        (["--checkpoint=run", "--prompt", "--json"], ["--prompt needs a value"]),
        ([*GIVEN, "--temperature=hot"], ["--temperature=hot cannot be read", "a number"]),
        ([*GIVEN, "--top_k=1.5"], ["--top_k=1.5 cannot be read", "a whole number"]),
        ([*GIVEN, "--json=yes"], ["--json=yes cannot be read", "no value"]),
        ([*GIVEN, "--temperature=-1"], ["--temperature=-1.0 must be finite and at least 0"]),
        ([*GIVEN, "--top_p=0"], ["--top_p=0.0 must be above 0 and at most 1"]),
        ([*GIVEN, "--top_p", "1.1"], ["--top_p=1.1 must be above 0 and at most 1"]),
        ([*GIVEN, "--top_k=-1"], ["--top_k=-1 must be at least 0"]),
        ([*GIVEN, "--seed=-1"], ["--seed=-1 must be between 0 and"]),
        ([*GIVEN, "--max_new_tokens=0"], ["--max_new_tokens=0 must be at least 1"]),
        ([*GIVEN, "--port=1"], ["--port needs --serve"]),
        ([*SERVING, "--prompt=x"], ["--prompt means nothing with --serve"]),
        ([*SERVING, "--temperature=0"], ["--temperature means nothing with --serve"]),
        ([*SERVING, "--port=x"], ["--port=x cannot be read", "a whole number"]),
        ([*SERVING, "--port=65536"], ["--port=65536 must be between 0 and 65535"]),
        ([*SERVING, "--slots=0"], ["--slots=0 must be at least 1"]),
        ([*SERVING, "--cache_tokens=0"], ["--cache_tokens=0 must be at least 1"]),
        ([*SERVING, "--api_key="], ["--api_key is empty"]),
        ([*GIVEN, "--speculative=-1"], ["--speculative=-1 must be at least 0"]),
        ([*GIVEN, "--speculative=some"], ["--speculative=some cannot be read", "a whole number"]),
        ([*GIVEN, "--min_p=2"], ["--min_p=2.0 must be between 0 and 1"]),
        ([*GIVEN, "--presence_penalty=3"], ["--presence_penalty=3.0 must be between -2 and 2"]),
        ([*GIVEN, "--weights=int4"], ["--weights=int4 cannot be read", "compute or float8"]),
        ([*GIVEN, "--mesh.expert=x"], ["--mesh.expert=x cannot be read", "a whole number"]),
        ([*GIVEN, "--mesh.experts=2"], ["--mesh.experts is not an option", "did you mean --mesh.expert?"]),
        ([*GIVEN, "--chat=yes"], ["--chat=yes cannot be read", "no value"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv, parts, capsys):
    with pytest.raises(ArgumentError) as caught:
        parse_infer(argv)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    for part in parts:
        assert part in message
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--checkpoint=absent"], 1, "error: absent holds no checkpoint: give a workdir"),
        (["--max_new_tokens=127"], 2, "2 tokens and max_new_tokens=127 need 129 positions, and the model has"),
        (["--max_new_tokens=-3"], 2, "error: --max_new_tokens=-3 must be at least 1"),
        (["--speculative=1"], 2, "speculative=1 must be at least 0, and 0 for a model without MTP module"),
        (["--mesh.expert=3"], 2, "mesh.expert=3 makes 3, which must be the number of devices, 8"),
        (["--mesh.tensor=8"], 2, "mesh.tensor=8 must divide its 'heads' of 4"),
        (["--mesh.context=8"], 2, "mesh.context=8 must be 1 to generate"),
        (["--weights=float8"], 1, "is F32, and weights=float8 holds what is in FP8 already"),
    ],
)
def test_how_a_run_that_cannot_be_ends(workdir, options, code, part, monkeypatch, capsys):
    assert run([f"--checkpoint={workdir}", "--prompt=t", *options], monkeypatch) == code
    out, error = capsys.readouterr()
    assert part in error and error.count("\n") == 1


def test_help_tells_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_infer(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert caught.value.code == 0
    for option in OPTIONS:
        assert f"--{option} " in shown
    assert "0 always takes the most probable token. (default: 0.8)" in shown
