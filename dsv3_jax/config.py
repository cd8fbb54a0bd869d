"""The configuration of a run: frozen dataclasses, complete in themselves, checked once (config_checks.py).

Every field carries its meaning as a docstring; `python train.py --config=NAME --help` prints them.
The letters in brackets are the dimension letters used in names and einsums (legend in model/transformer.py).
The sections model, task and grpo have files of their own.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from dsv3_jax.errors import UserError
from dsv3_jax.grpo_config import GRPOConfig
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.task_config import TaskConfig

Weights = Literal["compute", "float8"]
"""How a model that runs holds its matrices: in the type it multiplies in, or as the blocks of an FP8 checkpoint."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run. The message names the field, its value and what would be right."""

    exit_code = 2


@dataclass(frozen=True)
class DataConfig:
    """Text in, packed token rows out."""

    kind: Literal["documents", "chats", "rollouts"] = "documents"
    """documents: every token is learnt, in rows cut from one stream. chats: what an assistant said is learnt, its end
    included, and prompts are read; chats stay whole, and are packed into rows where none sees another (V3 section
    5.1). rollouts: the model's own responses to the configuration's task are learnt by what they are worth (section
    grpo); nothing else of this section but the tokenizer is read."""
    path: str = "stdlib"
    """'stdlib' (the Python standard library's own source on this machine), or a file, folder or glob of
    .txt .py .md .jsonl .parquet. Of chats: 'task' (demonstrations of the configuration's task), or .jsonl."""
    text_field: str = "text"
    """Field of .jsonl objects and column of .parquet files that holds the text."""
    tokenizer: str = "train"
    """'train' (a byte-level BPE on the training split, kept in the workdir) or the path of a tokenizer.json."""
    validation_share: float = 0.05
    """Share of documents held out, chosen by a hash of their name."""
    fill_in_the_middle_rate: float = 0.1
    """Share of documents rewritten prefix-suffix-middle (V3 section 4.1)."""
    streams: int = 1
    """Streams that the documents are dealt out to, each filling an equal share of every batch: a process reads those of
    its own rows only. What is in a batch depends on their number, not on that of the processes."""
    isolate_documents: bool = False
    """Mask attention across document boundaries in a row and restart positions there; V3 pre-training does not. Chats
    are isolated always."""
    messages_field: str = "messages"
    """Field of a .jsonl object that holds a chat, a list of {"role": ..., "content": ...}."""
    problem_field: str = "problem"
    """Field of a .jsonl object without messages that holds what the user says."""
    response_field: str = "response"
    """Field of a .jsonl object without messages that holds what the assistant says."""
    demonstrations: int = 20_000
    """Training problems of the task to take demonstrations of."""
    answers_only: float = 0.0
    """Share of the task's demonstrations that keep their answer and lose the working before it."""
    formless: float = 0.0
    """Share of the task's demonstrations without R1's form: working and answer are lines, and no tags around them."""
    overlong_chats: Literal["refuse", "leave_out"] = "refuse"
    """What to do about a chat longer than a row: stop the run, or leave it out. None is ever cut: its end would be
    lost, which has to be learnt."""

    @property
    def isolated(self) -> bool:
        """Whether a token sees its own document or chat alone."""
        return self.kind == "chats" or self.isolate_documents


@dataclass(frozen=True)
class TrainingConfig:
    """Length and batch of the run."""

    tokens: int
    """Training tokens of the whole run; the number of steps is tokens / (batch_size * sequence_length)."""
    sequence_length: int
    """[S] tokens a row."""
    batch_size: int
    """[B] rows an optimizer step."""
    microbatches: int = 1
    """Splits of the batch whose gradients are accumulated; the result does not depend on it."""
    log_interval: int = 10
    """Steps between logged metrics."""
    validation_interval: int = 0
    """Steps between validations; 0: only at the end."""
    sample_tokens: int = 160
    """Tokens of the sample generated at the end; 0: no sample."""

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch_size * self.sequence_length)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the V3 learning-rate shape, its token counts as shares of the run (V3 section 4.2)."""

    learning_rate: float
    """Peak."""
    warmup_steps: int
    """Linear warm-up from 0."""
    constant_until: float = 10.0 / 14.8
    """Share of the run after which the cosine begins."""
    cosine_until: float = 14.3 / 14.8
    """Share of the run after which the first constant tail begins."""
    first_tail_until: float = 14.633 / 14.8
    """Share of the run after which the second constant tail begins."""
    first_tail_ratio: float = 0.1
    """Learning rate of the first tail relative to the peak: 2.2e-5 / 2.2e-4."""
    second_tail_ratio: float = 7.3e-6 / 2.2e-4
    """Learning rate of the second tail relative to the peak."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment; not stated in the paper."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norm gains are not decayed."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type that both moments are kept in; they are computed with in float32 (V3 section 3.3.3: bfloat16)."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the auxiliary objectives and of the router bias (V3 sections 2.1.2, 2.2, 4.2)."""

    balance_weight: float = 1e-4
    """Alpha of the sequence-wise balance loss."""
    bias_speed: float = 0.001
    """Step of the router bias after each optimizer step."""
    bias_until: float = 14.3 / 14.8
    """Share of the run after which the bias is frozen."""
    mtp_weight: float = 0.3
    """Lambda of the MTP loss."""
    mtp_weight_until: float = 10.0 / 14.8
    """Share of the run after which mtp_late_weight applies."""
    mtp_late_weight: float = 0.1
    """Lambda of the MTP loss for the rest of the run."""
    teacher: str | None = None
    """Folder with a model, of the same tokenizer, whose probabilities are learnt in place of the next tokens
    (distillation): the same step runs it on the same rows."""
    teacher_weight: float = 1.0
    """Share of the divergence from the teacher; the rest is the loss of the next token. MTP learns the tokens."""
    teacher_temperature: float = 1.0
    """Divides the logits of both before they are compared."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices, and one axis may be -1, the rest.

    All but context and tensor divide the batch.
    """

    data: int = -1
    """Copies of the model."""
    fsdp: int = 1
    """Pieces of every parameter, gathered layer by layer."""
    node: int = 1
    """Groups of devices with slow links between them; experts are divided over node and expert together."""
    expert: int = 1
    """Devices that the experts of a node are divided over."""
    context: int = 1
    """Pieces of every row."""
    tensor: int = 1
    """Pieces of attention heads, feed-forward widths and vocabulary."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run's state is saved."""

    interval: int = 1000
    """Steps between checkpoints; one more is written at the end and at SIGTERM or SIGINT."""
    keep: int = 2
    """Newest checkpoints kept."""


@dataclass(frozen=True)
class Config:
    """One run: model, data, training, optimizer, losses, checkpoints, mesh, task, grpo."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    loss: LossConfig = field(default_factory=LossConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    seed: int = 0
    """Seed of everything random: parameters, data order, sampling."""

    @property
    def moments(self) -> str:
        """Name of the type that the optimizer's moments are kept in."""
        return "bfloat16" if self.model.precision == "fp8" else self.optimizer.moments


def to_json(config: Any) -> str:
    """A configuration (whole or one section) as indented JSON; `from_json` reads a whole one back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """A whole configuration from `to_json`'s text.

    Raises:
        ConfigError: the text is not JSON, or a field is unknown or missing.
    """
    try:
        values = json.loads(text)
        sections = {
            "model": ModelConfig,
            "data": DataConfig,
            "training": TrainingConfig,
            "optimizer": OptimizerConfig,
            "loss": LossConfig,
            "checkpoint": CheckpointConfig,
            "mesh": MeshConfig,
            "task": TaskConfig,
            "grpo": GRPOConfig,
        }
        built = {name: kind(**values.pop(name)) for name, kind in sections.items() if name in values}
        return Config(**built, **values)
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"not a saved configuration of this version: {error}") from error
