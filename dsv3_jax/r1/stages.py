"""The stages of R1 (Nature version, figure 2; arXiv 2501.12948 sections 2.2 to 2.4): what each starts and learns from.

How each trains is its configuration, configs/PREFIX_STAGE.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traces:
    """Responses that a stage's model made to training problems, the correct ones: chats that others learn from."""

    name: str
    of: str
    """The stage that answers."""
    least_thinking: int = 0
    """Characters of thinking that one has to have."""


@dataclass(frozen=True)
class Stage:
    """One run of train.py."""

    name: str
    start: str | None = None
    """Stage whose parameters and tokenizer it begins with; None: from nothing."""
    learns_from: Traces | None = None
    """None: what its configuration says, its own responses for instance."""
    teacher: str | None = None
    """Stage whose probabilities it learns."""
    tokenizer_of: str | None = None
    """Stage whose tokenizer it takes, where it starts from nothing."""


COLD_START = Traces("cold_start", of="zero", least_thinking=1)
"""Right and readable: what R1-Zero answered without showing how is left out."""
REJECTION = Traces("rejection", of="reasoning")
"""Rejection sampling."""

STAGES = (
    Stage("base"),
    Stage("zero", start="base"),
    Stage("cold_start", start="base", learns_from=COLD_START),
    Stage("reasoning", start="cold_start"),
    Stage("rejection", start="base", learns_from=REJECTION),
    Stage("final", start="rejection"),
    Stage("student", tokenizer_of="base"),
    Stage("student_traces", start="student", learns_from=REJECTION),
    Stage("student_logits", start="student", learns_from=REJECTION, teacher="final"),
    Stage("student_grpo", start="student"),
)
"""In the order they run. The last is what the two before it are compared with: the same student without a teacher."""
GIVEN = ("base", "student")
"""Stages that a model from elsewhere can take the place of."""
