"""Chat templates as programs: jinja in a sandbox, with what transformers offers to templates, and with limits.

A template comes with a model, from anywhere. The sandbox keeps it from files, modules and the internals of Python.
Bounded besides: the time of loops, recursion and calls (`SECONDS`), the length of what is rendered, and the operators
* and **. Not bounded: the memory of one single step, such as padding a text to a width of 1e9 or doubling one with ~
thirty times, and the time of one single filter. Only a process of its own with limits of its own could bound those.
"""

import json
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_jax.errors import UserError

SECONDS = 5.0
LONGEST_PRODUCT = 2**20
LARGEST_EXPONENT = 64

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


class ChatError(UserError, ValueError):
    """Messages or a chat template that no prompt can be made of."""

    exit_code = 2


def compiled(source: str, name: str) -> Template:
    """The template of this source; errors call it `name`.

    Raises:
        ChatError: not a jinja template.
    """
    try:
        return _Environment().from_string(source)
    except TemplateSyntaxError as error:
        raise ChatError(f"{name} is not a chat template: line {error.lineno}: {one_line(error)}") from error
    except Exception as error:  # a constant expression is computed here already, and can raise anything
        raise ChatError(f"{name} is not a chat template: {one_line(error)}") from error


def rendered(template: Template, variables: Mapping[str, Any], longest: int) -> str:
    """What the template writes, at most `longest` characters.

    Raises:
        ChatError: the template raises, is still running after `SECONDS`, or writes more.
    """
    pieces, length = [], 0
    token = _deadline.set(time.monotonic() + SECONDS)
    try:
        for piece in template.generate(variables):
            length += len(piece)
            if length > longest:
                raise ChatError(f"the chat template writes more than {longest:,} characters for these messages")
            pieces.append(piece)
    except ChatError:
        raise
    except _Refusal as error:
        raise ChatError(f"the chat template refuses these messages: {one_line(error)}") from error
    except Exception as error:  # a template is a program: it can divide by zero, recurse forever, add a text to None
        raise ChatError(f"the chat template fails on these messages: {one_line(error)}") from error
    finally:
        _deadline.reset(token)
    return "".join(pieces)


def one_line(error: Exception) -> str:
    """The error's message in one short line, its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Refusal(TemplateError):
    """raise_exception was called."""


class _Generation(Extension):
    """{% generation %}: transformers' mark around what the model wrote. Nothing here needs it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        # A loop may call nothing, so each body begins with a call, which looks at the clock.
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(call, lineno=loop.lineno))
            call.set_lineno(loop.lineno)
        tree.set_environment(self)
        return tree

    def tick(self) -> None:
        if time.monotonic() > _deadline.get():
            raise TimeoutError(f"still running after {SECONDS:g} seconds")

    def call(self, context: Context, obj: Any, /, *arguments: Any, **named: Any) -> Any:
        self.tick()
        return super().call(context, obj, *arguments, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and max(abs(left), abs(right)) > LARGEST_EXPONENT:
            raise OverflowError(f"a power of numbers beyond {LARGEST_EXPONENT}")
        for factor, times in ((left, right), (right, left)):
            if hasattr(factor, "__len__") and len(factor) * times > LONGEST_PRODUCT:
                raise OverflowError(f"a text or list repeated to more than {LONGEST_PRODUCT:,}")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own escapes < > & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
