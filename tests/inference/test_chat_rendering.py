"""Templates that raise, run forever or write without end become one line."""

import pytest

from dsv3_jax.inference import chat_rendering
from dsv3_jax.inference.chat_rendering import ChatError, compiled, rendered


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ raise_exception('roles must\\nalternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[0].content + none }}", "fails on these messages: can only concatenate"),
        ("{{ messages[9].content.x }}", "fails on these messages: "),
        ("{{ messages.append(1) }}", "fails on these messages: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "fails on these messages: .*unsafe"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "still running after 0.1"),
        ("{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n }}{% endmacro %}{{ f(60) }}", "still running after 0.1"),
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "more than 8,000,000 characters"),
        ("{{ 'x' * 10 ** 12 }}", "repeated to more"),
        ("{{ 9 ** 9 ** 9 }}", "a power of numbers"),
    ],
)
def test_templates_that_fail(monkeypatch, source, error):
    if "0.1" in error:
        monkeypatch.setattr(chat_rendering, "SECONDS", 0.1)
    template = compiled(source, "here")
    with pytest.raises(ChatError, match=error) as caught:
        rendered(template, {"messages": [{"role": "system", "content": "x"}]}, 8_000_000)
    assert "\n" not in str(caught.value)
