"""Runs the stages one after the other, each as the command that a user would type; goes on where it stopped."""

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from dsv3_jax.command_line import parse_train
from dsv3_jax.config import Config
from dsv3_jax.errors import ArgumentError, UserError
from dsv3_jax.files import write_atomically
from dsv3_jax.r1.arguments import R1Arguments
from dsv3_jax.r1.stages import STAGES, Stage, Traces
from dsv3_jax.training.progress import note
from dsv3_jax.training.resume import read_config, refuse_other_run

TRAIN = Path(__file__).parents[2] / "train.py"
POLL_SECONDS = 0.2


class StageError(UserError):
    """A stage that did not come to its end."""


class StoppedError(UserError):
    """A signal ended the pipeline; a run that was under way has saved its checkpoint."""

    exit_code = 130


class Pipeline:
    """The stages of one folder: FOLDER/STAGE is a workdir, FOLDER/STAGE.json its model's figures on held-out problems,
    FOLDER/TRACES.jsonl what a stage answered correctly."""

    def __init__(self, arguments: R1Arguments, interrupted: Callable[[], bool]):
        """Raises ArgumentError: a stage's options do not make a run, or not the one that was begun; nothing has run."""
        self._arguments, self._interrupted = arguments, interrupted
        stages = [stage for stage in STAGES if stage.name not in arguments.given]
        self._configs = {stage.name: self._config(stage) for stage in stages}
        last = list(self._configs).index(arguments.options.until) if arguments.options.until else len(stages) - 1
        self.stages = stages[: last + 1]

    def run(self) -> None:
        """Everything that is not done yet: stages, the traces they learn from, an evaluation of every model.

        Raises:
            StageError: a command failed, or no response was right; what the command said stands before it.
            StoppedError: by SIGINT or SIGTERM.
        """
        for name in self._arguments.given:
            self._evaluate(name)
        for number, stage in enumerate(self.stages, start=1):
            if stage.learns_from:
                self._sample(stage.learns_from)
            if not self._is_done(stage):
                self._command(
                    f"stage {number} of {len(self.stages)}, {stage.name}", [str(TRAIN), *self._train_options(stage)]
                )
                if not self._is_done(stage):
                    raise StoppedError(f"stopped in stage {stage.name}: the same command goes on from there")
            self._evaluate(stage.name)

    def figures(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Of every model that is there: what tasks/evaluation.py found, and the seconds that it trained."""
        for stage in STAGES:
            path, summary = self._evaluation(stage.name), self.model(stage.name) / "summary.json"
            if path.exists():
                found = json.loads(path.read_text(encoding="utf-8"))
                trained = json.loads(summary.read_text(encoding="utf-8")) if self._is_done(stage) else {}
                yield stage.name, found | {"seconds": trained.get("seconds")}

    def model(self, name: str) -> Path:
        """The folder of a stage's model."""
        return self._arguments.given.get(name) or self._arguments.folder / name

    def _is_done(self, stage: Stage) -> bool:
        return stage.name not in self._arguments.given and (self.model(stage.name) / "summary.json").exists()

    def _config(self, stage: Stage) -> Config:
        """The configuration that a stage has; the same as before, if it was begun before."""
        try:
            arguments = parse_train(self._train_options(stage))
            if saved := read_config(arguments.workdir):
                refuse_other_run(saved, arguments.config, arguments.workdir)
        except UserError as error:
            raise ArgumentError(f"stage {stage.name}: {error}") from error
        return arguments.config

    def _train_options(self, stage: Stage) -> list[str]:
        arguments = self._arguments
        options = [f"--config={arguments.configs}_{stage.name}", f"--workdir={self.model(stage.name)}"]
        if stage.start:
            options.append(f"--init={self.model(stage.start)}")
        if stage.tokenizer_of:
            options.append(f"--data.tokenizer={self.model(stage.tokenizer_of) / 'tokenizer.json'}")
        if stage.learns_from:
            options.append(f"--data.path={self._traces(stage.learns_from)}")
        if stage.teacher:
            options.append(f"--loss.teacher={self.model(stage.teacher)}")
        return [*options, f"--seed={arguments.options.seed}", *arguments.options_of(stage.name)]

    def _task_options(self, name: str) -> list[str]:
        """How the model of a stage is asked: as R1-Zero is in its rollouts, whatever its own configuration says."""
        config = self._configs["zero"]
        task = [f"--task.{field}={value}" for field, value in dataclasses.asdict(config.task).items()]
        sampling = [f"--max_new_tokens={config.grpo.max_new_tokens}", f"--temperature={config.grpo.temperature}"]
        return [f"--checkpoint={self.model(name)}", *sampling, *(task if name in self._arguments.given else [])]

    def _sample(self, traces: Traces) -> None:
        """Write the traces, unless they are there."""
        path = self._traces(traces)
        if path.exists():
            return
        problems = self._arguments.problems_of(traces)
        options = [*self._task_options(traces.of), "--split=train", f"--problems={problems}"]
        options.append(f"--samples={self._arguments.options.samples}")
        options += [f"--save={path}", f"--least_thinking={traces.least_thinking}", "--show=0"]
        self._command(f"traces of {traces.of}", ["-m", "dsv3_jax.tasks", *options])
        if not path.read_text(encoding="utf-8"):
            path.unlink()
            right = "rightly and with its working" if traces.least_thinking else "rightly"
            raise StageError(
                f"stage {traces.of} answered none of {problems} training problems {right}: there are no traces"
            )

    def _traces(self, traces: Traces) -> Path:
        return self._arguments.folder / f"{traces.name}.jsonl"

    def _evaluate(self, name: str) -> None:
        """Write the figures of a model on the held-out problems, unless they are there."""
        if not self._evaluation(name).exists():
            options = ["-m", "dsv3_jax.tasks", *self._task_options(name), "--json"]
            write_atomically(self._evaluation(name), self._command(f"evaluation of {name}", options, read=True))

    def _evaluation(self, name: str) -> Path:
        return self._arguments.folder / f"{name}.json"

    def _command(self, what: str, arguments: Sequence[str], read: bool = False) -> str:
        """Run Python with these arguments, handing on a signal to this process. Returns what it printed, if that is to
        be read. Raises StageError, StoppedError."""
        note(f"\n{what}\n  {shlex.join(['python', *arguments])}")
        with TemporaryFile("w+") as output:
            process = subprocess.Popen([sys.executable, *arguments], stdout=output if read else None)
            told = False
            while process.poll() is None:
                if self._interrupted() and not told:
                    process.terminate()
                    told = True
                time.sleep(POLL_SECONDS)
            output.seek(0)
            printed = output.read()
        if process.returncode == 0:
            return printed
        if self._interrupted():
            raise StoppedError(f"stopped in {what}: the same command goes on from there")
        raise StageError(f"{what}, ended with exit code {process.returncode}: what it said stands above")
