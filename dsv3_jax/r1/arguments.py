"""The command line of `python -m dsv3_jax.r1`: its own options, and those of train.py for one stage or for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_jax.command_line import option_pairs, parse_options, suggestion
from dsv3_jax.errors import ArgumentError
from dsv3_jax.r1.stages import GIVEN, STAGES, Traces

PROGRAM = "python -m dsv3_jax.r1"
NAMES = tuple(stage.name for stage in STAGES)


@dataclass(frozen=True)
class R1Options:
    """Make a reasoner of a base model, and students of it: all stages, or what is left of them to do."""

    configs: str = "tiny_r1"
    """The stage NAME trains as configs/PREFIX_NAME.py says; this is the prefix."""
    folder: Path | None = None
    """Where all of it is kept, a workdir a stage; None: runs/PREFIX."""
    base: Path | None = None
    """Model to begin with in place of the stage base: a workdir, checkpoint or Hugging Face directory."""
    student: Path | None = None
    """Model to begin with in place of the stage student; it has the tokenizer of base."""
    until: str | None = None
    """Last stage to run; None: all."""
    seed: int = 0
    """Seed of every stage."""
    cold_start_problems: int = 1000
    """Training problems that R1-Zero answers for the cold start."""
    rejection_problems: int = 2000
    """Training problems that the reasoning model answers for rejection sampling."""
    samples: int = 4
    """Responses to each of them."""


@dataclass(frozen=True)
class R1Arguments:
    """Options, checked, and what else follows from the command line."""

    options: R1Options
    stage_options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Options of train.py by stage; of all stages under ''."""

    @property
    def configs(self) -> str:
        return self.options.configs

    @property
    def folder(self) -> Path:
        return self.options.folder or Path("runs") / self.configs

    @property
    def given(self) -> dict[str, Path]:
        """Models from elsewhere, by the stage that they take the place of."""
        models = {name: getattr(self.options, name) for name in GIVEN}
        return {name: path for name, path in models.items() if path is not None}

    def options_of(self, stage: str) -> list[str]:
        return [*self.stage_options.get("", ()), *self.stage_options.get(stage, ())]

    def problems_of(self, traces: Traces) -> int:
        """How many training problems are answered for them."""
        return getattr(self.options, f"{traces.name}_problems")


def parse_r1(argv: Sequence[str]) -> R1Arguments:
    """Raises ArgumentError: an option that is neither this program's nor train.py's, or an unreadable value."""
    own, of_stages = dict[str, str | None](), dict[str, list[str]]()
    for name, value in option_pairs(argv):
        stage, _, option = name.partition(".")
        if option and stage in NAMES:
            of_stages.setdefault(stage, []).append(f"--{option}={value}")
        elif option:
            of_stages.setdefault("", []).append(f"--{name}={value}")
        else:
            own[name] = value
    options = parse_options(own, PROGRAM, R1Options())
    left = [name for name in NAMES if getattr(options, name, None) is None]
    if options.until is not None and options.until not in left:
        raise ArgumentError(
            f"--until={options.until} is no stage to run{suggestion(options.until, left)}; there are {', '.join(left)}"
        )
    for name in ("cold_start_problems", "rejection_problems", "samples"):
        if getattr(options, name) < 1:
            raise ArgumentError(f"--{name}={getattr(options, name)} must be at least 1")
    for name in GIVEN:
        path = getattr(options, name)
        if path is not None and not path.is_dir():
            raise ArgumentError(f"--{name}={path} is no folder with a model")
    return R1Arguments(options, of_stages)
