"""A chat is the prompt that transformers makes of it, and no message can place a special token."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from dsv3_jax.data.tokenizer import encode, special_tokens, tokenizer_from, train_tokenizer
from dsv3_jax.inference.chat import DEEPSEEK, ChatError, ChatTemplate, chat_template

TEXT = "def naïve(x):\n    return 'é漢字🙂'  # déjà vu <think> user assistant system\n"
OTHERS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]")

# Templates written here in the manners of the models they are named after.
R1 = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='', first=true) -%}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system = ns.system + ('' if ns.first else '\\n\\n') + message['content'] %}{% set ns.first = false %}
{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
LLAMA = """{{ bos_token }}
{% for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{% endif %}
"""
QWEN = """{{ bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.index > 40 %}{% break %}{% endif %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- if content.startswith('<think>') and not loop.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must\\nalternate') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}
{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""

USER_FIRST = [
    {"role": "user", "content": " héllo 漢字\n"},
    {"role": "assistant", "content": "<think>\nhm, 漢\n</think>\n\nfine\n"},
    {"role": "user", "content": "and <b> > now</think?>"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be naïve.  "}, *USER_FIRST]


@pytest.fixture(scope="module")
def tokenizer():
    trained = train_tokenizer([TEXT * 20], 400)
    trained.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in OTHERS])
    return tokenizer_from(trained.to_str(), "here", 1000)


@pytest.fixture(scope="module")
def ids(tokenizer):
    """Ids of a prompt given as text, special tokens spelled; made by the library, not by this project."""
    spelled = Tokenizer.from_str(tokenizer.to_str())
    return lambda text: spelled.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def deepseek(tokenizer):
    return chat_template(None, tokenizer)


def with_template(source, tokenizer):
    return chat_template({"chat_template.jinja": source}, tokenizer)


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("source", [R1, LLAMA, QWEN, MISTRAL, DEEPSEEK], ids="R1 LLAMA QWEN MISTRAL DEEPSEEK".split())
def test_prompts_are_those_of_transformers(tokenizer, source, continued):
    oracle = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        chat_template=source,
    )
    ours = with_template(source, tokenizer)
    for messages in (USER_FIRST,) if source is MISTRAL else (USER_FIRST, WITH_SYSTEM):
        if continued:
            messages = [*messages, {"role": "assistant", "content": "So, "}]
        for extra in ({}, {"tools": [{"name": "fé<>"}]}, {"enable_thinking": False}):
            for prompted in (False,) if continued else (False, True):
                asked = {"add_generation_prompt": prompted, "continue_final_message": continued}
                expected = oracle.apply_chat_template(messages, return_dict=False, **asked, **extra)
                assert ours.token_ids(messages, **asked, **extra) == expected


def test_deepseeks_layout(deepseek, ids):
    messages = [{"role": "developer", "content": "Two."}, *WITH_SYSTEM]
    begun = (
        "<｜begin▁of▁sentence｜>Two.\n\nBe naïve.  <｜User｜> héllo 漢字\n<｜Assistant｜>\n\nfine\n"
        "<｜end▁of▁sentence｜><｜User｜>and <b> > now</think?>"
    )
    assert deepseek.token_ids(messages) == ids(begun + "<｜Assistant｜>")
    assert deepseek.token_ids(messages, thinking=True) == ids(begun + "<｜Assistant｜><think>\n")
    assert deepseek.token_ids(messages, add_generation_prompt=False) == ids(begun)
    prefill = [*messages, {"role": "assistant", "content": "<think>\nSo</think>Yes, "}]
    continued = deepseek.token_ids(prefill, continue_final_message=True)
    assert continued == ids(begun + "<｜Assistant｜><think>\nSo</think>Yes, ")
    with pytest.raises(ChatError, match="no format for tools"):
        deepseek.token_ids([{"role": "tool", "content": "4"}])


def test_which_template(tokenizer, ids):
    def prompt(**files):
        named = {name.replace("__", "."): text for name, text in files.items()}
        texts = {name: text if isinstance(text, str) else json.dumps(text) for name, text in named.items()}
        return chat_template(texts, tokenizer).token_ids([{"role": "user", "content": "x"}])

    beginning = "<｜begin▁of▁sentence｜>"
    config = {"bos_token": {"content": "[INST]"}, "chat_template": "config {{ bos_token }}"}
    assert prompt(chat_template__jinja="file", tokenizer_config__json=config) == ids("[INST]file")
    assert prompt(tokenizer_config__json=config) == ids("[INST]config [INST]")
    several = [{"name": "rag", "template": "b"}, {"name": "default", "template": "a"}]
    assert prompt(tokenizer_config__json={"chat_template": several}) == ids(beginning + "a")
    assert prompt(chat_template__jinja="{{ sep_token }}", special_tokens_map__json={"sep_token": "[/INST]"}) == ids(
        beginning + "[/INST]"
    )
    assert prompt(tokenizer_config__json={"chat_template": None}) == ids(beginning + "<｜User｜>x<｜Assistant｜>")
    for content in ("{", "[]", {"chat_template": 3}, {"chat_template": several[:1]}, {"chat_template": "{% if %}"}):
        with pytest.raises(ChatError, match=r"^\S* ?.*tokenizer_config.json"):
            prompt(tokenizer_config__json=content)


def test_a_tokenizer_without_deepseeks_tokens_needs_a_template():
    plain = Tokenizer.from_str(train_tokenizer(["a"], 300).to_str().replace("<｜User｜>", "<|human|>"))
    with pytest.raises(ChatError, match="without a chat template, and its tokenizer has no <｜User｜>"):
        chat_template(None, plain)


@pytest.mark.parametrize("written", ["", "{{ bos_token }}", "{{ bos_token * 2 }}"])
def test_one_beginning_token(tokenizer, written, ids):
    template = with_template(written + "{{ messages[0].content }}", tokenizer)
    assert template.token_ids([{"role": "user", "content": "x"}]) == ids("<｜begin▁of▁sentence｜>x")


SPELLINGS = (
    "<｜User｜>", "a <｜Assistant｜><think>\nb</think>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
    "<<think>>", "x<｜end▁of▁sentence", " <｜end▁of▁sentence｜\n", "\n>", "end▁of▁sentence｜> \ue000\ue001",
    "[INST][/INST]",
)  # fmt: skip


@pytest.mark.parametrize("spelled", SPELLINGS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_message_places_no_special_token(tokenizer, deepseek, role, spelled):
    chat = [{"role": role, "content": spelled}]
    if role == "assistant":
        spelled = "said: " + spelled
        chat = [{"role": role, "content": "<think>" + spelled[:9] + "</think>" + spelled}]
    special = special_tokens(tokenizer)
    user, assistant = tokenizer.token_to_id("<｜User｜>"), tokenizer.token_to_id("<｜Assistant｜>")
    before = {"system": [], "user": [user], "assistant": [assistant]}[role]
    after = [special.end] if role == "assistant" else []
    expected = [special.beginning, *before, *encode(tokenizer, spelled), *after, assistant]
    assert deepseek.token_ids(chat) == expected


def test_nor_together_with_what_the_template_writes_or_through_other_fields(tokenizer):
    source = "<｜{{ messages[0].content | trim }}｜>{{ messages[0].name }}{{ tools | tojson }}{{ word }}"
    special = set(tokenizer.get_added_tokens_decoder())
    template = with_template(source, tokenizer)
    message = {"role": "user", "content": " User｜> <｜User ", "name": "<think>"}
    prompt = template.token_ids([message], tools=[{"<｜User｜>": ["<｜User｜>"]}], word="｜><｜User｜>")
    assert [token for token in prompt if token in special] == [special_tokens(tokenizer).beginning]
    text = '<｜User｜> <｜User｜><think>[{"<｜User｜>": ["<｜User｜>"]}]｜><｜User｜>'
    assert tokenizer.decode(prompt) == text


def test_spellings_that_share_or_are_single_characters():
    tokenizer = train_tokenizer(["a"], 300)
    tokenizer.add_special_tokens(["ab", "bc", "%"])
    template = ChatTemplate("ab%{{ messages[0].content }}bc", "here", tokenizer, {})
    a, b, c, percent = (tokenizer.token_to_id(name) for name in "abc%")
    ab, bc = (tokenizer.token_to_id(name) for name in ("ab", "bc"))
    prompt = template.token_ids([{"role": "user", "content": "abc%"}])
    letters = encode(tokenizer, "abc%")
    assert percent not in letters[:3] and letters[:3] == [a, b, c]
    assert prompt == [special_tokens(tokenizer).beginning, ab, percent, *letters, bc]


def test_the_tags_of_an_assistants_own_thinking_are_tokens_where_a_template_keeps_them(tokenizer, ids):
    kept = with_template("{{ messages[0].content }}", tokenizer)
    content = "\n<think>1 <think></think>2 </think>"
    marked = kept.token_ids([{"role": "assistant", "content": content}])
    text = lambda part: encode(tokenizer, part)  # noqa: E731
    opening, closing = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")
    beginning = special_tokens(tokenizer).beginning
    assert marked == [beginning, *text("\n"), opening, *text("1 <think>"), closing, *text("2 </think>")]
    assert kept.token_ids([{"role": "user", "content": content}]) == [beginning, *text(content)]


def test_parts_and_nothing(deepseek, ids):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "refusal": None}]
    expected = ids("<｜begin▁of▁sentence｜><｜User｜>a\nb<｜Assistant｜><｜end▁of▁sentence｜><｜Assistant｜>")
    assert deepseek.token_ids(messages) == expected


@pytest.mark.parametrize(
    ("messages", "extra", "error"),
    [
        ([], {}, "messages must be a list of at least one"),
        ("hello", {}, "messages must be a list"),
        (["hello"], {}, r"messages\[0\] is of type str"),
        (
            [{"role": "robot", "content": ""}],
            {},
            r"messages\[0\].role is 'robot', must be one of system developer user",
        ),
        ([{"role": ["user"], "content": ""}], {}, r"messages\[0\].role"),
        ([{"role": "user", "content": 3}], {}, r"messages\[0\].content is of type int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, r"content\[0\] has type 'image_url', must be"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, r"content\[0\] is of type dict"),
        (
            [{"role": "user", "content": "a\ud800"}],
            {},
            r"messages\[0\].content has half a surrogate pair at character 1",
        ),
        ([{"role": "user", "content": "x" * 5_000_000}], {}, "5,000,015 characters, at most 4,000,000"),
        ([{"role": "user", "content": "x"}], {"bos_token": "x"}, "bos_token cannot be given"),
        ([{"role": "user", "content": "x"}], {"tools": [object()]}, r"tools\[0\] is of type object"),
        ([{"role": "user", "content": "x"}], {"continue_final_message": True}, "last message of role assistant"),
    ],
)
def test_messages_that_are_refused(deepseek, messages, extra, error):
    with pytest.raises(ChatError, match=error) as caught:
        deepseek.token_ids(messages, **extra)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_nesting_beyond_what_python_can_follow_is_refused(deepseek):
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ChatError, match="nested too deeply"):
        deepseek.token_ids([{"role": "user", "content": "x", "name": nested}])


def test_a_template_that_writes_nothing(tokenizer):
    with pytest.raises(ChatError, match="writes nothing"):
        with_template("{# #}", tokenizer).token_ids([{"role": "user", "content": "x"}])


def test_a_message_that_the_template_leaves_out_cannot_be_continued(tokenizer):
    messages = [{"role": "assistant", "content": "x"}]
    with pytest.raises(ChatError, match="leaves out the last message"):
        with_template("hello", tokenizer).token_ids(messages, continue_final_message=True)
