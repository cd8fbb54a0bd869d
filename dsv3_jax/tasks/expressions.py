"""Expressions of whole numbers, + - * / and parentheses, evaluated exactly; nothing else is read, nothing executed."""

import re
from fractions import Fraction

TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")
LONGEST = 200
"""Characters; so that neither the parser's recursion nor a number grows beyond sense."""


class ExpressionError(ValueError):
    """A text that is no expression, or one without a value."""


def evaluated(text: str) -> tuple[Fraction, list[int]]:
    """The value of an expression, and the numbers in it from left to right. * and / bind more than + and -.

    Raises:
        ExpressionError: not an expression of the above, too long, or a division by zero.
    """
    if len(text) > LONGEST:
        raise ExpressionError(f"more than {LONGEST} characters")
    parser = _Parser(_tokens(text.strip()))
    value = parser.sum()
    if parser.rest:
        raise ExpressionError(f"{parser.rest[0]!r} where the expression should end")
    return value, parser.numbers


def _tokens(text: str) -> list[str]:
    tokens, place = list[str](), 0
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None:
            raise ExpressionError(f"{text[place]!r} is no part of an expression")
        tokens.append(match[1])
        place = match.end()
    return tokens


class _Parser:
    """Recursive descent, one method a level of precedence."""

    def __init__(self, tokens: list[str]):
        self.rest = tokens
        self.numbers: list[int] = []

    def sum(self) -> Fraction:
        value = self.product()
        while self.rest and self.rest[0] in "+-":
            value = value + self.product() if self.rest.pop(0) == "+" else value - self.product()
        return value

    def product(self) -> Fraction:
        value = self.factor()
        while self.rest and self.rest[0] in "*/":
            if self.rest.pop(0) == "*":
                value *= self.factor()
            elif divisor := self.factor():
                value /= divisor
            else:
                raise ExpressionError("a division by zero")
        return value

    def factor(self) -> Fraction:
        token = self.rest.pop(0) if self.rest else "the end"
        if token == "(":
            value = self.sum()
            if not self.rest or self.rest.pop(0) != ")":
                raise ExpressionError("a parenthesis that nothing closes")
            return value
        if not token.isdigit():
            raise ExpressionError(f"{token} where a number should stand")
        self.numbers.append(int(token))
        return Fraction(self.numbers[-1])
