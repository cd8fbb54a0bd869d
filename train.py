"""Train a DeepSeek-V3: `python train.py --config=tiny`. `--help` lists the configs and every option.

Running the same command again goes on where the run stopped.
"""

from dsv3_jax.runtime import use_compilation_cache, use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import sys
from collections.abc import Callable
from pathlib import Path

import jax
from tokenizers import Tokenizer

from dsv3_jax.command_line import TrainArguments, parse_train, run_main
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.data.corpus import Corpus, open_corpus
from dsv3_jax.data.pipeline import training_batches, validation_batches
from dsv3_jax.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer, training_texts
from dsv3_jax.model.functional import Skeleton, skeleton_of
from dsv3_jax.training.checkpoint import Checkpoints, open_checkpoint, restore_part
from dsv3_jax.training.evaluation import make_evaluate
from dsv3_jax.training.flops import measured_matmul_rate
from dsv3_jax.training.interruption import catch_signals
from dsv3_jax.training.loop import Surroundings, run_steps
from dsv3_jax.training.metrics import MetricsLog
from dsv3_jax.training.progress import Progress
from dsv3_jax.training.report import write_report
from dsv3_jax.training.resume import read_config, refuse_other_model, refuse_other_run, write_config
from dsv3_jax.training.step import TrainState, initial_state


def main() -> None:
    arguments = parse_train(sys.argv[1:])
    use_compilation_cache()
    with catch_signals() as interrupted:
        train(arguments, interrupted)


def train(arguments: TrainArguments, interrupted: Callable[[], bool]) -> None:
    """One run, from its first step or its last checkpoint to its last step and its report."""
    config, workdir = arguments.config, arguments.workdir
    if saved := read_config(workdir):
        refuse_other_run(saved, config, workdir)
    corpus = open_corpus(config.data)
    tokenizer = run_tokenizer(arguments, corpus)
    write_config(workdir, config)

    skeleton = skeleton_of(config.model)
    batches = iter(training_batches(corpus.train, tokenizer, config))
    checkpoints = Checkpoints(workdir / "checkpoints", config, tokenizer.to_str())
    state, data_state = first_state(arguments, skeleton, checkpoints)
    if data_state:
        batches.set_state(data_state)

    evaluate = make_evaluate(config, skeleton)

    def validate(state: TrainState):
        held_out = validation_batches(corpus.validation, tokenizer, config)
        return evaluate(state.parameters, state.router_bias, held_out)

    step = int(state.step)
    log, progress = MetricsLog(workdir, step), Progress(config.training.steps, step)
    rate = measured_matmul_rate(config.model, rows_at_once(config))
    around = Surroundings(batches, checkpoints, log, progress, validate, interrupted, rate)
    try:
        result = run_steps(state, config, skeleton, around)
        if not result.finished:
            progress.message(f"stopped at step {int(result.state.step)}; the same command goes on from there")
            return
    finally:
        for resource in (progress, log, batches, checkpoints):
            resource.close()
    write_report(result, config, workdir, corpus, tokenizer, skeleton, validate(result.state), rate)


def run_tokenizer(arguments: TrainArguments, corpus: Corpus) -> Tokenizer:
    """The tokenizer kept in the workdir; on a first start that of `--init`, that of data.tokenizer, or a new one."""
    config, kept = arguments.config, arguments.workdir / "tokenizer.json"
    if kept.exists():
        return load_tokenizer(kept, config.model.vocabulary)
    if config.data.tokenizer != "train":
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.vocabulary)
    elif arguments.init:
        tokenizer = Tokenizer.from_str(open_checkpoint(arguments.init).tokenizer)
    else:
        tokenizer = train_tokenizer(training_texts(corpus.train), config.model.vocabulary)
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, kept)
    return load_tokenizer(kept, config.model.vocabulary)


def first_state(
    arguments: TrainArguments, skeleton: Skeleton, checkpoints: Checkpoints
) -> tuple[TrainState, dict | None]:
    """The last checkpoint's state and data position, or a fresh state, with the parameters of `--init` if given."""
    config = arguments.config
    abstract = jax.eval_shape(lambda: initial_state(config, skeleton))
    if restored := checkpoints.restore_latest(abstract):
        return restored.state, restored.data_state
    state = initial_state(config, skeleton)
    if arguments.init:
        state = with_parameters_of(arguments.init, state, arguments)
    return state, None


def with_parameters_of(source: Path, state: TrainState, arguments: TrainArguments) -> TrainState:
    """The state with parameters and router biases of a checkpoint of the same model and tokenizer."""
    saved = open_checkpoint(source)
    refuse_other_model(saved.config, arguments.config, source)
    kept = (arguments.workdir / "tokenizer.json").read_text(encoding="utf-8")
    if Tokenizer.from_str(saved.tokenizer).get_vocab() != Tokenizer.from_str(kept).get_vocab():
        raise ConfigError(
            f"data.tokenizer={arguments.config.data.tokenizer} is not the tokenizer of --init={source}: leave it out"
        )
    parts = {"parameters": state.parameters, "router_bias": state.router_bias}
    return state._replace(**restore_part(saved.directory, parts))


def rows_at_once(config: Config) -> int:
    """Tokens in one forward pass: the height of the model's matmuls."""
    training = config.training
    return training.batch_size // training.microbatches * training.sequence_length


if __name__ == "__main__":
    run_main(main)
