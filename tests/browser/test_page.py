"""The chat page in headless Chromium, against infer.py --serve as a user starts it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

import infer
from configs.tiny import config as tiny
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.functional import initialize
from dsv3_jax.training.checkpoint import Checkpoints

ROOT = Path(infer.__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
KEY = {"Authorization": "Bearer key"}
SHAPE = {"vocabulary": 320, "width": 32, "layers": 3, "dense_layers": 1, "experts": 8, "expert_ffn_width": 16}
# While somebody waits for the first compilation.
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(f"no browser: install {', '.join(BROWSERS[:-1])} or {BROWSERS[-1]}, or set CHROMIUM to one's path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "little"
    model = dataclasses.replace(tiny.model, **SHAPE, mtp_depth=1, maximum_positions=256, initializer_std=0.3)
    tokenizer = train_tokenizer(["naïve 漢字🙂 text " * 50], SHAPE["vocabulary"])
    checkpoints = Checkpoints(workdir / "checkpoints", dataclasses.replace(tiny, model=model), tokenizer.to_str())
    # Its text is mixed: whole words, and characters of several tokens.
    parameters, router_bias = initialize(model, 4)
    checkpoints.save(1, {"parameters": parameters, "router_bias": router_bias}, {})
    checkpoints.close()
    options = ["--serve", "--port=0", "--api_key=key", "--slots=2", "--speculative=1"]
    command = [sys.executable, "infer.py", f"--checkpoint={workdir}", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().strip().partition(" at ")[2]
        process.kill()


@pytest.fixture
def mistakes():
    """Errors that the page has written to the console or thrown, the one about the missing key aside."""
    return list[str]()


@pytest.fixture
def page(browser, address, mistakes):
    with browser.new_page() as page:
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.on("console", lambda message: mistakes.append(message.text) if message.type == "error" else None)
        page.goto(address)
        expect(page.locator(".assistant")).to_have_text("This server needs an API key: enter it above.")
        assert len(mistakes) == 1 and "401" in mistakes.pop()
        yield page


def enter_key(page: Page) -> None:
    page.get_by_label("API key").fill("key")
    page.get_by_label("API key").press("Tab")
    expect(page).to_have_title("little")


def say(page: Page, text: str, replies: int) -> None:
    """Send a message; returns when the page has so many whole replies."""
    page.get_by_label("message").fill(text)
    page.get_by_label("message").press("Enter")
    expect(page.locator(".assistant")).to_have_count(replies)
    expect(page.locator("#numbers")).to_contain_text("drafts that stay")


def shown_experts(page: Page, reply: int) -> list:
    """[tokens][layers][experts a token], read off the page token by token as a keyboard's user does."""
    tokens = page.locator(".assistant").nth(reply).locator(".token")
    shown, count = [], tokens.count()
    tokens.first.focus()
    for place in range(count):
        expect(tokens.nth(place)).to_be_focused()
        expect(page.locator("#chosen")).to_have_text(re.compile(rf"^of token {len(shown) + 1}(,| of )"))
        lines = page.locator("#listing").text_content().splitlines()
        assert [line.partition(":")[0] for line in lines] == ["layer 1", "layer 2"]
        layers = [line.partition(": ")[2].split(" | ") for line in lines]
        shown += [
            [[int(expert) for expert in ids.split()] for ids in of_token] for of_token in zip(*layers, strict=True)
        ]
        page.keyboard.press("ArrowRight")
    return shown


def painted(page: Page) -> list[list[int]]:
    """The experts of each layer whose cells have the colour of the token looked at."""
    colours = page.locator("#heat").evaluate(
        """(canvas, [layers, experts]) => {
          const middle = (at, size, count) => Math.floor((at + 0.5) * size / count), context = canvas.getContext("2d");
          const colour = (x, y) => [...context.getImageData(x, y, 1, 1).data].join(" ");
          return Array.from({length: layers}, (_, layer) => Array.from({length: experts}, (_, expert) =>
            colour(middle(expert, canvas.width, experts), middle(layer, canvas.height, layers))));
        }""",
        [2, 8],
    )
    lit = page.locator("#chosen").evaluate(
        "element => getComputedStyle(element).color.match(/\\d+/g).join(' ') + ' 255'"
    )
    return [[expert for expert, colour in enumerate(of_layer) if colour == lit] for of_layer in colours]


def test_a_chat_shows_its_speed_its_drafts_and_the_experts_of_each_token(page, address, mistakes):
    enter_key(page)
    page.get_by_label("temperature").fill("0")
    page.get_by_label("tokens").fill("30")
    messages: list[dict] = []
    for reply, text in enumerate(["<b>naïve</b>", "text"], start=1):
        say(page, text, reply + 1)
        messages.append({"role": "user", "content": text})
        body = {"messages": messages, "temperature": 0, "top_p": 0.95, "max_tokens": 30, "routed_experts": True}
        made = page.request.post(f"{address}/v1/chat/completions", data=body, headers=KEY, timeout=0).json()
        choice, tokens = made["choices"][0], made["usage"]["completion_tokens"]
        numbers = rf"^{tokens} tokens · [\d.]+ tokens/s · [\d.]+ tokens a pass · drafts that stay: \d+%$"
        assert re.match(numbers, re.sub(r"\s+", " ", page.locator("#numbers").text_content()))
        assert page.locator(".assistant").nth(reply).text_content() == choice["message"]["content"] != ""
        # The newest tokens without anybody's doing, then each.
        expect(page.locator("#chosen")).to_contain_text(f"{tokens} of {tokens} ")
        newest = [int(token) - 1 for token in re.findall(r"\d+", page.locator("#chosen").text_content())]
        of_newest = [choice["routed_experts"][place] for place in newest[: newest.index(tokens - 1) + 1]]
        assert len(choice["routed_experts"]) == tokens > 5
        assert painted(page) == [sorted(set().union(*of_layer)) for of_layer in zip(*of_newest, strict=True)]
        assert shown_experts(page, reply) == choice["routed_experts"]
        messages.append({"role": "assistant", "content": choice["message"]["content"]})
    assert page.locator(".user").all_text_contents() == ["<b>naïve</b>", "text"]

    # The first token of the first reply, by the pointer.
    page.locator(".assistant").nth(1).locator(".token").first.hover()
    expect(page.locator("#chosen")).to_contain_text("of token 1")
    page.get_by_role("button", name="new chat").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#experts")).to_be_hidden()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "text", 1)
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "text"}]
    assert mistakes == []


def test_what_a_model_writes_is_text_and_a_model_without_experts_shows_none(page, mistakes):
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;"
    model = {"id": "little", "routing": {"first_layer": 3, "layers": 0, "experts": 8, "groups": 1}}
    chunk = {"choices": [{"index": 0, "text": text, "finish_reason": "length"}]}
    stream = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [model]}))
    page.route("**/v1/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    enter_key(page)
    page.get_by_label("mode").select_option("continue text")
    page.get_by_label("message").fill("<i>x</i>")
    with page.expect_request("**/v1/completions") as asked:
        page.get_by_label("message").press("Enter")
    assert asked.value.post_data_json["routed_experts"] is False
    expect(page.locator(".assistant").last).to_have_text(f"<i>x</i>{text}")
    expect(page.locator("#numbers")).to_contain_text("1 tokens")
    expect(page.locator("#experts")).to_be_hidden()
    assert page.locator("main img, main script, main i").count() == 0
    assert mistakes == []
