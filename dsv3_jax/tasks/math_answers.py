"""Whether two mathematical answers are the same one, by math-verify. Runs in a process of its own, by itself."""

from math_verify import parse, verify


def agrees(expected: str, answer: str) -> bool:
    """`expected` and `answer` are LaTeX or plain expressions, with or without $...$ or \\boxed{...}."""
    return bool(verify(parse(_in_mathematics(expected)), parse(_in_mathematics(answer))))


def _in_mathematics(text: str) -> str:
    # The library finds LaTeX between signs that say so, and would take nothing of a bare \\frac{1}{2}.
    return text if "$" in text or "\\boxed" in text else f"${text}$"
