"""Train a DeepSeek-V3: `python train.py --config=tiny`. `--help` lists the configs and every option.

Running the same command again goes on where the run stopped.
"""

from dsv3_jax.runtime import set_up_compiler, use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from dsv3_jax.command_line import TrainArguments, parse_train, run_main
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.convert.opening import OpenedModel, open_model
from dsv3_jax.data.chat_rows import ChatBatches, ChatEncoder, chat_validation_batches
from dsv3_jax.data.chats import ChatCorpus, open_chats
from dsv3_jax.data.corpus import Corpus, open_corpus
from dsv3_jax.data.pipeline import StreamedBatches, TrainingBatches, validation_batches
from dsv3_jax.data.tokenizer import load_tokenizer, tokenizer_from, train_tokenizer, training_texts
from dsv3_jax.files import write_atomically
from dsv3_jax.inference.chat import ChatTemplate, chat_template
from dsv3_jax.kernels.scaled_matmul import multiplies_float8
from dsv3_jax.layout import describe, mesh_of
from dsv3_jax.loading import tokenizer_of
from dsv3_jax.model.functional import Skeleton, skeleton_of
from dsv3_jax.posttraining.grpo_loop import GRPOSurroundings, run_grpo
from dsv3_jax.posttraining.grpo_report import repeat_grpo_report, write_grpo_report
from dsv3_jax.posttraining.grpo_state import abstract_grpo_state, first_grpo_state
from dsv3_jax.posttraining.grpo_step import make_grpo_step, make_scorer
from dsv3_jax.posttraining.rollout import open_rollouts
from dsv3_jax.processes import is_first_process, join_processes
from dsv3_jax.training.checkpoint import Checkpoints, complete_steps, open_checkpoint
from dsv3_jax.training.distillation import open_teacher
from dsv3_jax.training.evaluation import Evaluation, make_evaluate
from dsv3_jax.training.flops import measured_matmul_rate
from dsv3_jax.training.interruption import catch_signals
from dsv3_jax.training.loop import Surroundings, run_steps
from dsv3_jax.training.metrics import MetricsLog, NoLog
from dsv3_jax.training.progress import Progress, note
from dsv3_jax.training.report import Run, repeat_report, write_report
from dsv3_jax.training.resume import read_config, refuse_other_model, refuse_other_run, write_config
from dsv3_jax.training.state import TrainState, abstract_state, initial_state
from dsv3_jax.training.step import compile_train_step
from sharding.mesh import row_shards, rows_here


def main() -> None:
    arguments = parse_train(sys.argv[1:])
    set_up_compiler()
    if arguments.describe:
        print(describe(arguments.config, skeleton_of(arguments.config.model), jax.device_count()))
        return
    join_processes(arguments.process, arguments.config)
    with catch_signals() as interrupted:
        run = learn_from_rollouts if arguments.config.data.kind == "rollouts" else train
        run(arguments, interrupted)


def train(arguments: TrainArguments, interrupted: Callable[[], bool]) -> None:
    """One run, from its first step or its last checkpoint to its last step and its report."""
    config, workdir = arguments.config, arguments.workdir
    if saved := read_config(workdir):
        refuse_other_run(saved, config, workdir)
        if repeat_report(workdir):
            return
    skeleton = skeleton_of(config.model)
    mesh = mesh_of(config, skeleton)
    note_float8(config, mesh.devices.flat[0].device_kind)
    corpus = open_chats(config) if config.data.kind == "chats" else open_corpus(config.data)
    documents = f"{len(corpus.train)} {config.data.kind} to train on, {len(corpus.validation)} held out"
    note(f"corpus {config.data.path}: {documents}")
    source = open_source(arguments)
    tokenizer_text, teacher = given_tokenizer(arguments, source), None
    if config.loss.teacher:
        of_teacher = open_model(Path(config.loss.teacher))
        tokenizer_text = tokenizer_text or of_teacher.tokenizer
        teacher = open_teacher(of_teacher, config, tokenizer_text, mesh)
    # Compiling needs only the config: it goes on in the background while tokenizer, parameters and data get ready.
    train_step = ThreadPoolExecutor(1).submit(compile_train_step, config, skeleton, mesh, teacher)
    tokenizer_text = tokenizer_text or new_tokenizer(config, corpus)
    tokenizer = tokenizer_from(tokenizer_text, "the tokenizer", config.model.vocabulary)
    texts = texts_from(workdir, source)
    template = chat_template((texts or {}).get("files"), tokenizer) if isinstance(corpus, ChatCorpus) else None
    batches = training_batches(corpus, tokenizer, template, config, streams_here(config, mesh))
    # From here on the workdir is this run's: whatever could be refused has been.
    first = is_first_process()
    if first:
        write_config(workdir, config)
        write_atomically(kept_tokenizer(workdir), tokenizer_text)

    checkpoints = Checkpoints(workdir / "checkpoints", config, tokenizer_text, texts)
    state, data_state = first_state(config, skeleton, mesh, checkpoints, source)
    if data_state:
        batches.set_state(data_state)
    evaluate = make_evaluate(config, skeleton, mesh)

    def validate(state: TrainState) -> Evaluation:
        return evaluate(state.parameters, state.router_bias, held_out_batches(corpus, tokenizer, template, config))

    step = int(state.step)
    note("compiling the training step; the next run finds it in the cache")
    log = MetricsLog(workdir, step) if first else NoLog()
    progress = Progress(config.training.steps, step, silent=not first)
    try:
        compiled_step = train_step.result()
        rate = measured_matmul_rate(config.model, tokens_at_once(config, mesh)) * mesh.size
        rows = config.training.batch_size
        around = Surroundings(batches, checkpoints, log, progress, validate, interrupted, rate, rows, mesh)
        result = run_steps(state, compiled_step, config, skeleton, around)
        if not result.finished:
            progress.message(f"stopped at step {int(result.state.step)}; the same command goes on from there")
            return
    finally:
        for resource in (progress, log, batches, checkpoints):
            resource.close()
    evaluation = validate(result.state)
    if first:
        write_report(Run(config, workdir, corpus, tokenizer, template), result, evaluation, rate)


def training_batches(
    corpus: Corpus, tokenizer: Tokenizer, template: ChatTemplate | None, config: Config, streams: list[int]
) -> StreamedBatches:
    """What is trained on, of the streams that are this process's."""
    if isinstance(corpus, ChatCorpus) and template:
        return ChatBatches(corpus.train, ChatEncoder(template, tokenizer, config), config, streams)
    return TrainingBatches(corpus.train, tokenizer, config, streams)


def held_out_batches(
    corpus: Corpus, tokenizer: Tokenizer, template: ChatTemplate | None, config: Config
) -> Iterator[dict[str, Any]]:
    """What is validated on: the same at every call."""
    if isinstance(corpus, ChatCorpus) and template:
        return chat_validation_batches(corpus.validation, ChatEncoder(template, tokenizer, config), config)
    return validation_batches(corpus.validation, tokenizer, config)


def learn_from_rollouts(arguments: TrainArguments, interrupted: Callable[[], bool]) -> None:
    """As `train`, where the data are the model's own responses to a task: GRPO (posttraining/grpo_loop.py)."""
    config, workdir = arguments.config, arguments.workdir
    if saved := read_config(workdir):
        refuse_other_run(saved, config, workdir)
        if repeat_grpo_report(workdir):
            return
    skeleton = skeleton_of(config.model)
    mesh = mesh_of(config, skeleton)
    note_float8(config, mesh.devices.flat[0].device_kind)
    source = open_source(arguments)
    tokenizer_text = given_tokenizer(arguments, source)
    if tokenizer_text is None or not (source or complete_steps(workdir / "checkpoints")):
        raise ConfigError("data.kind=rollouts needs --init=DIR, a model with a tokenizer: its responses are the data")
    tokenizer = tokenizer_from(tokenizer_text, "the tokenizer", config.model.vocabulary)
    texts = texts_from(workdir, source)
    rollouts = open_rollouts(config, mesh, tokenizer, (texts or {}).get("files"))
    # From here on the workdir is this run's: whatever could be refused has been.
    write_config(workdir, config)
    write_atomically(kept_tokenizer(workdir), tokenizer_text)

    checkpoints = Checkpoints(workdir / "checkpoints", config, tokenizer_text, texts)
    restored = checkpoints.restore_latest(abstract_grpo_state(config, skeleton, mesh))
    state = restored.state if restored else first_grpo_state(fresh_state(config, skeleton, mesh, source), config)
    log, progress = MetricsLog(workdir, int(state.step)), Progress(config.training.steps, int(state.step))
    step = make_grpo_step(config, skeleton, mesh, rollouts.known_W)
    score = make_scorer(config, skeleton, mesh, rollouts.known_W)
    around = GRPOSurroundings(rollouts, score, checkpoints, log, progress, interrupted, row_shards(mesh))
    note("compiling sampler and step; the next run finds them in the cache")
    try:
        result = run_grpo(state, step, config, around)
        if result.finished:
            write_grpo_report(workdir, config, result, around)
        else:
            progress.message(f"stopped at step {int(result.state.step)}; the same command goes on from there")
    finally:
        for resource in (progress, log, checkpoints):
            resource.close()


def note_float8(config: Config, kind: str) -> None:
    """Says whether devices of this kind multiply FP8 (kernels/scaled_matmul.py), and what happens where they do not."""
    if config.model.precision != "fp8":
        return
    if multiplies_float8(kind):
        note(f"model.precision=fp8: {kind} multiplies FP8, in all three products of every linear layer and expert")
    else:
        note(
            f"model.precision=fp8: {kind} has no products of FP8 here, only TPU7x and Hopper GPUs have. Numbers are "
            "rounded to FP8 as the recipe says and multiplied in float32: it learns as it would in FP8, no faster than "
            "in float32"
        )


def open_source(arguments: TrainArguments) -> OpenedModel | None:
    """The model of `--init`, the same as this run's; None without it, and once the run has a checkpoint of its own."""
    if arguments.init is None or complete_steps(arguments.workdir / "checkpoints"):
        return None
    source = open_model(arguments.init)
    refuse_other_model(source.config, arguments.config, arguments.init)
    return source


def given_tokenizer(arguments: TrainArguments, source: OpenedModel | None) -> str | None:
    """Text of the tokenizer.json kept in the workdir; on a first start that of data.tokenizer or `--init`, word for
    word; None: to be trained."""
    config, kept = arguments.config, kept_tokenizer(arguments.workdir)
    of_source = tokenizer_of(source) if source else None
    if not kept.exists() and config.data.tokenizer == "train":
        return source.tokenizer if source else None
    path = kept if kept.exists() else config.data.tokenizer
    tokenizer = load_tokenizer(path, config.model.vocabulary)
    if of_source and of_source.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} is not the tokenizer of --init={arguments.init}: leave it out"
        )
    return Path(path).read_text(encoding="utf-8")


def new_tokenizer(config: Config, corpus: Corpus) -> str:
    note(f"tokenizer: training a byte-level BPE of {config.model.vocabulary} entries")
    return train_tokenizer(training_texts(corpus.train), config.model.vocabulary).to_str(pretty=True)


def texts_from(workdir: Path, source: OpenedModel | None) -> dict[str, Any] | None:
    """What came with the model from a Hugging Face directory, by way of this run's first checkpoint or of `--init`."""
    if source:
        return source.hugging_face
    return open_checkpoint(workdir).hugging_face if complete_steps(workdir / "checkpoints") else None


def kept_tokenizer(workdir: Path) -> Path:
    return workdir / "tokenizer.json"


def first_state(
    config: Config, skeleton: Skeleton, mesh: Mesh, checkpoints: Checkpoints, source: OpenedModel | None
) -> tuple[TrainState, dict | None]:
    """The last checkpoint's state and data position, or a fresh state, with the parameters of the source if given."""
    if restored := checkpoints.restore_latest(abstract_state(config, skeleton, mesh)):
        return restored.state, restored.data_state
    return fresh_state(config, skeleton, mesh, source), None


def fresh_state(config: Config, skeleton: Skeleton, mesh: Mesh, source: OpenedModel | None) -> TrainState:
    state = initial_state(config, skeleton, mesh)
    if source:
        state = state._replace(**source.read({"parameters": state.parameters, "router_bias": state.router_bias}))
    return state


def streams_here(config: Config, mesh: Mesh) -> list[int]:
    """Streams of documents that fill the rows of this process's devices."""
    rows_a_stream = config.training.batch_size // config.data.streams
    return sorted({row // rows_a_stream for row in rows_here(config.training.batch_size, mesh)})


def tokens_at_once(config: Config, mesh: Mesh) -> int:
    """Tokens in one forward pass of one device: the height of its matmuls."""
    training = config.training
    return training.batch_size // training.microbatches * training.sequence_length // row_shards(mesh)


if __name__ == "__main__":
    run_main(main)
