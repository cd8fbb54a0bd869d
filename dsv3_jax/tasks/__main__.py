"""How well a model solves a task: `python -m dsv3_jax.tasks --checkpoint=runs/tiny_sft`. `--help` lists the options.

With --save, what the model answered correctly becomes chats to train on: rejection sampling (R1 section 2.3.3).
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv3_jax import tasks
from dsv3_jax.command_line import option_pairs, parse_options, run_main
from dsv3_jax.config import MeshConfig
from dsv3_jax.config_checks import check_task
from dsv3_jax.convert.opening import OpenedModel, open_model
from dsv3_jax.data.errors import DataError
from dsv3_jax.errors import ArgumentError
from dsv3_jax.files import write_atomically
from dsv3_jax.inference.arguments import ONE_DEVICE
from dsv3_jax.inference.chat import chat_template
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.weights import ready_to_decode
from dsv3_jax.layout import mesh_to_run
from dsv3_jax.loading import load_opened
from dsv3_jax.runtime import set_up_compiler, use_one_thread
from dsv3_jax.task_config import TaskConfig
from dsv3_jax.tasks.evaluation import Figures, Judged, TaskEvaluation, evaluate
from dsv3_jax.tasks.problem import Problem, Task, thinking_in
from dsv3_jax.tasks.responses import PAGE_SIZE, Responder, response_ends
from dsv3_jax.training.progress import note


@dataclass(frozen=True)
class TaskArguments:
    """Let a model answer the problems of a task, greedily and several times at a temperature."""

    checkpoint: Path
    """A workdir of train.py (its newest checkpoint), the folder of one checkpoint, or a Hugging Face directory."""
    task: TaskConfig
    """By default the task of the checkpoint's own configuration."""
    split: Literal["held_out", "validation", "train"] = "held_out"
    """Problems to answer."""
    problems: int | None = None
    """The first so many of them; None: all, of train as many as are held out."""
    samples: int = 8
    """Responses to each at the temperature."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Sampling(temperature=1.0, top_p=1.0)
    )
    max_new_tokens: int = 128
    """Tokens of a response at most; what is cut off there is in no form to be correct."""
    slots: int = 32
    """Responses that are made at the same time."""
    speculative: int = 0
    """Tokens that the MTP module guesses ahead; 0: none."""
    mesh: MeshConfig = ONE_DEVICE
    """Devices to divide model and responses over; all 1, the default here: the first device."""
    save: Path | None = None
    """Write the sampled responses that are correct to this .jsonl file, as chats that data.kind=chats reads."""
    least_thinking: int = 0
    """Characters of thinking that a saved response has to have: an answer that comes from nowhere teaches guessing."""
    show: int = 3
    """Problems to show with their first sampled response."""
    json: bool = False
    """Print the figures as one JSON object instead."""


def main() -> None:
    argv = sys.argv[1:]
    if "-h" in argv or "--help" in argv:
        parse_options({}, "python -m dsv3_jax.tasks", TaskArguments(Path(), TaskConfig()), wants_help=True)
    given = dict(option_pairs(argv, flags=("json",)))
    if not given.get("checkpoint"):
        raise ArgumentError("--checkpoint=DIR is missing; --help lists all options")
    opened = open_model(Path(str(given["checkpoint"])))
    arguments = parse(given, opened.config.task)
    task = tasks.build(arguments.task)
    problems = chosen_problems(arguments, task)
    set_up_compiler()
    evaluation, greedy, sampled = evaluate(
        load_responder(opened, arguments),
        problems,
        arguments.sampling,
        arguments.max_new_tokens,
        arguments.samples,
    )
    if arguments.save:
        saved = save_chats(arguments.save, problems, sampled, arguments.least_thinking)
        note(f"{arguments.save}: {saved} different correct responses")
    if arguments.json:
        print(json.dumps(dataclasses.asdict(evaluation)))
        return
    for problem, (first, *_) in list(zip(problems, sampled, strict=True))[: arguments.show]:
        rewards = ", ".join(f"{name} {value:g}" for name, value in first.verdict.rewards.items())
        print(f"  > {problem.prompt}\n{first.response.text}\n  [{first.verdict.failed or rewards}]\n")
    print("\n".join(report(arguments, evaluation)))


def parse(given: dict[str, str | None], task: TaskConfig) -> TaskArguments:
    """The arguments of these options, checked. Raises ArgumentError, SamplingError, ConfigError."""
    if "json" in given:
        given = given | {"json": given["json"] or "True"}
    defaults = TaskArguments(Path(str(given["checkpoint"])), task)
    arguments = parse_options(given, "python -m dsv3_jax.tasks", defaults)
    least = {
        "samples": 1,
        "max_new_tokens": 1,
        "slots": 1,
        "speculative": 0,
        "show": 0,
        "problems": 1,
        "least_thinking": 0,
    }
    for name, number in least.items():
        if (value := getattr(arguments, name)) is not None and value < number:
            raise ArgumentError(f"--{name}={value} must be at least {number}")
    if arguments.save and arguments.save.is_dir():
        raise ArgumentError(f"--save={arguments.save} is a folder: give a .jsonl file")
    check_task(arguments.task)
    return arguments


def chosen_problems(arguments: TaskArguments, task: Task) -> Sequence[Problem]:
    """Raises ArgumentError: more problems than the split has."""
    if arguments.split == "train":
        return [task.problem(index) for index in range(arguments.problems or arguments.task.held_out_problems)]
    problems = task.held_out if arguments.split == "held_out" else task.validation
    if arguments.problems is not None and arguments.problems > len(problems):
        raise ArgumentError(
            f"--problems={arguments.problems} is more than there are, {len(problems)} (task.{arguments.split}_problems)"
        )
    return problems[: arguments.problems]


def load_responder(opened: OpenedModel, arguments: TaskArguments) -> Responder:
    """Raises DataError: the model has no tokenizer. ChatError: and no chat template that fits it."""
    use_one_thread(opened.config.model)
    model, _, tokenizer = load_opened(opened, mesh=mesh_to_run(arguments.mesh))
    if tokenizer is None:
        raise DataError(f"{opened.path} has no tokenizer.json: text cannot be read or written without one")
    files = (opened.hugging_face or {}).get("files")
    chat = chat_template(files, tokenizer)
    engine = Engine(
        ready_to_decode(model),
        tokenizer,
        slots=arguments.slots,
        speculative=arguments.speculative,
        page_size=PAGE_SIZE,
    )
    return Responder(engine, tokenizer, chat, response_ends(files, tokenizer, chat))


def save_chats(
    path: Path, problems: Sequence[Problem], sampled: Sequence[Sequence[Judged]], least_thinking: int = 0
) -> int:
    """Write the different correct responses to every problem, one chat a line. Returns how many there are."""

    def is_kept(one: Judged) -> bool:
        thinks = len(thinking_in(one.response.text)) >= least_thinking
        return one.verdict.correct and one.response.ended and thinks

    lines = [
        json.dumps({"messages": [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": text}]})
        for problem, of_problem in zip(problems, sampled, strict=True)
        for text in dict.fromkeys(one.response.text for one in of_problem if is_kept(one))
    ]
    write_atomically(path, "".join(f"{line}\n" for line in lines))
    return len(lines)


def report(arguments: TaskArguments, evaluation: TaskEvaluation) -> Iterator[str]:
    """The figures in words."""
    yield f"{evaluation.problems} problems of {arguments.task.kind} ({arguments.split})"
    for name, of in (
        ("greedy", evaluation.greedy),
        (f"{arguments.samples} samples at T={arguments.sampling.temperature:g}", evaluation.sampled),
    ):
        yield f"{name:<20} {', '.join(_described(of))}"


def _described(of: Figures) -> Iterator[str]:
    yield from (f"pass@{k} {share:.3f}" for k, share in of.pass_at.items())
    yield from (f"{name} {value:.3f}" for name, value in of.rewards.items())
    yield f"{of.tokens:.1f} tokens"
    yield f"{of.ended:.1%} ended"
    for reason, count in of.failed.items():
        yield f"no verdict on {count} of {of.responses}: {reason}"


if __name__ == "__main__":
    run_main(main)
