"""The end of a run: validation against general-purpose compressors, plots, a sample, summary.json, what to try next."""

import json
import shlex
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tokenizers import Tokenizer

from dsv3_jax.config import Config
from dsv3_jax.data.chats import ChatCorpus
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.pipeline import validation_bytes
from dsv3_jax.files import write_atomically
from dsv3_jax.inference.chat import ChatTemplate
from dsv3_jax.inference.completion import Completion, complete
from dsv3_jax.inference.reasoning import CLOSING, OPENING
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.functional import put_together, skeleton_of
from dsv3_jax.training.compression import bits_per_byte
from dsv3_jax.training.evaluation import Evaluation
from dsv3_jax.training.flops import model_flops_per_token, parameter_counts
from dsv3_jax.training.loop import LoopResult
from dsv3_jax.training.plots import write_expert_load, write_loss_curve
from dsv3_jax.training.state import TrainState

PROMPT_CHARACTERS = 120


class Run(NamedTuple):
    """What a report is about."""

    config: Config
    workdir: Path
    corpus: Corpus
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    """Of a model that learnt from chats."""


def write_report(run: Run, result: LoopResult, evaluation: Evaluation, matmul_rate: float) -> None:
    """Write summary.json, loss.png and expert_load.png into the workdir, print the figures and a sample."""
    summary = summarize(run, result, evaluation, matmul_rate)
    write_loss_curve(run.workdir / "metrics.jsonl", run.workdir / "loss.png")
    if result.load_history:
        write_expert_load(result.load_history, run.workdir / "expert_load.png")
    print_summary(run.workdir, summary)
    prompt = held_out_prompt(run.corpus)
    if run.config.training.sample_tokens and jax.process_count() == 1:
        print_sample(sample(run, result.state, prompt), chat=run.template is not None)
    print_next_command(run.workdir, prompt, chat=run.template is not None)
    # Last: a workdir with a summary has had its whole report.
    write_atomically(run.workdir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")


def repeat_report(workdir: Path) -> bool:
    """Print the figures of a run that has ended; False where there is no summary.json yet."""
    path = workdir / "summary.json"
    if path.exists():
        print_summary(workdir, json.loads(path.read_text(encoding="utf-8")))
        print(f"\nThis run has ended. Another --workdir starts a new one; --init={workdir} gives it these parameters.")
    return path.exists()


def summarize(run: Run, result: LoopResult, evaluation: Evaluation, matmul_rate: float) -> dict[str, Any]:
    """The figures of a run, as summary.json holds them.

    `seconds` and the two speeds are of the steps this process made, its first step, checkpoints and validations left
    out; null where it made none.
    """
    training, text = run.config.training, validation_bytes(run.corpus.validation)
    counts = parameter_counts(run.config.model)
    speed = result.timed_tokens / result.seconds if result.seconds else None
    flops = model_flops_per_token(run.config.model, training.sequence_length)
    return {
        "validation_bits_per_byte": evaluation.bits_per_byte(len(text)),
        "zlib_bits_per_byte": bits_per_byte("zlib", text),
        "xz_bits_per_byte": bits_per_byte("xz", text),
        "validation_loss": evaluation.loss,
        "validation_bytes": len(text),
        "tokens": training.steps * training.batch_size * training.sequence_length,
        "seconds": result.seconds or None,
        "tokens_per_second": speed,
        "matmul_rate_share": speed and speed * flops / matmul_rate,
        "parameters": counts.main + counts.mtp,
        "active_parameters": counts.active,
    }


def print_summary(workdir: Path, summary: dict[str, Any]) -> None:
    bits, zlib, xz = (summary[f"{name}_bits_per_byte"] for name in ("validation", "zlib", "xz"))
    speed = ""
    if summary["seconds"]:
        speed = (
            f" in {summary['seconds']:.0f} s: {summary['tokens_per_second']:,.0f} tokens/s, "
            f"{summary['matmul_rate_share']:.0%} of the matmul rate of this machine"
        )
    print(
        f"\ntrained     {summary['tokens']:,} tokens{speed}"
        f"\nparameters  {summary['parameters']:,} with MTP; one token passes {summary['active_parameters']:,}"
        f"\nvalidation  {bits:.3f} bits per byte of {summary['validation_bytes']:,} held-out bytes; "
        f"zlib -9 needs {zlib:.3f}, xz -9 {xz:.3f}"
        f"\nfiles       {workdir}: summary.json, metrics.jsonl, loss.png, expert_load.png, checkpoints, tensorboard"
    )


def held_out_prompt(corpus: Corpus) -> str:
    """The first lines of a document the model has not seen: one more than a hundred characters into it. Of chats what
    a user said first."""
    if isinstance(corpus, ChatCorpus):
        messages = next(iter(corpus.validation)).messages
        return next((message["content"] for message in messages if message["role"] == "user"), "")
    text = next((document.text for document in corpus.validation if len(document.text) > PROMPT_CHARACTERS), "")
    return text[:PROMPT_CHARACTERS].rpartition("\n")[0] + "\n" if "\n" in text[:PROMPT_CHARACTERS] else text[:40]


def sample(run: Run, state: TrainState, prompt: str) -> Completion:
    # On one device, wherever the parameters were: a sample is one short row.
    trees = jax.device_put((state.parameters, state.router_bias), jax.local_devices()[0])
    model = put_together(skeleton_of(run.config.model.to_run), *trees)
    (completion,) = complete(
        model,
        run.tokenizer,
        [prompt],
        Sampling(seed=run.config.seed),
        run.config.training.sample_tokens,
        chat=run.template,
    )
    return completion


def print_sample(completion: Completion, *, chat: bool = False) -> None:
    what = "answering a held-out chat" if chat else "continuing the first lines of a held-out document"
    print(f"\nsample, {what}:\n")
    prompt = textwrap.indent(completion.prompt, "  > ", lambda line: True)
    thinking = f"{OPENING}{completion.reasoning}{CLOSING}" if completion.reasoning else ""
    print(prompt + "\n" * chat + textwrap.indent(thinking + completion.text, "    "))


def print_next_command(workdir: Path, prompt: str, *, chat: bool = False) -> None:
    first_line = prompt.strip().partition("\n")[0]
    command = ["python", "infer.py", f"--checkpoint={workdir}", f"--prompt={first_line}", *["--chat"] * chat]
    print(f"\nnext:\n  {shlex.join(command)}")
