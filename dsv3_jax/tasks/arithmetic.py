"""Sums, differences and products of two whole numbers, worked out digit by digit."""

import random
import re
from dataclasses import dataclass

from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks.generated import GeneratedTask
from dsv3_jax.tasks.problem import Verdict, answer_in, in_response_form, verdict_on

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,100}")
RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@dataclass(frozen=True)
class ArithmeticProblem:
    """left operator right = ?"""

    left: int
    operator: str
    right: int

    @property
    def key(self) -> str:
        low, high = sorted((self.left, self.right))
        return f"{low} {self.operator} {high}"

    @property
    def prompt(self) -> str:
        return f"What is {self.left}{self.operator}{self.right}?"

    @property
    def result(self) -> int:
        return RESULT[self.operator](self.left, self.right)

    def verify(self, response: str) -> Verdict:
        answer = answer_in(response)
        if answer is None:
            return verdict_on(False, 0.0)
        is_number = WHOLE_NUMBER.fullmatch(answer) is not None
        return verdict_on(True, float(is_number and int(answer) == self.result))

    def demonstration(self) -> str:
        lines = {"+": self._sum_lines, "-": self._difference_lines, "*": self._product_lines}[self.operator]()
        return in_response_form("\n".join(lines), str(self.result))

    def _sum_lines(self) -> list[str]:
        """Digits from the right, and the 1 that is carried."""
        lines, carry = [], 0
        left, right = str(self.left)[::-1], str(self.right)[::-1]
        for place in range(max(len(left), len(right))):
            parts = [int(number[place]) for number in (left, right) if place < len(number)] + [carry] * (carry > 0)
            total = sum(parts)
            carry = total // 10
            lines.append(f"{'+'.join(map(str, parts))}={total}")
        return lines

    def _difference_lines(self) -> list[str]:
        """The smaller from the larger, digits from the right, with the 10 that is borrowed."""
        high, low = max(self.left, self.right), min(self.left, self.right)
        lines, borrowed = [f"-({high}-{low})" if self.left < self.right else f"{high}-{low}"], 0
        for place, digit in enumerate(reversed(str(high))):
            taken = low // 10**place % 10 + borrowed
            borrowed = int(int(digit) < taken)
            top = int(digit) + 10 * borrowed
            lines.append(f"{top}-{taken}={top - taken}")
        return lines

    def _product_lines(self) -> list[str]:
        """One product a digit of the right number, and their running sum."""
        lines, total = [], 0
        for place, digit in enumerate(reversed(str(self.right))):
            factor = int(digit) * 10**place
            part = self.left * factor
            lines.append(f"{self.left}*{factor}={part},{total}+{part}={total + part}")
            total += part
        return lines


def arithmetic(config: TaskConfig) -> GeneratedTask[ArithmeticProblem]:
    """Operators of `task.arithmetic_operators`; numbers of `task.arithmetic_least_digits` to `task.arithmetic_digits`
    digits, all lengths as often."""

    def number(stream: random.Random) -> int:
        digits = stream.randint(config.arithmetic_least_digits, config.arithmetic_digits)
        return stream.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)

    def draw(stream: random.Random) -> ArithmeticProblem:
        return ArithmeticProblem(number(stream), stream.choice(config.arithmetic_operators), number(stream))

    return GeneratedTask(config, draw)
