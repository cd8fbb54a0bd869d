"""The configuration of a run: frozen dataclasses, complete in themselves, checked once (config_checks.py).

Every field carries its meaning as a docstring; `python train.py --config=NAME --help` prints them.
The letters in brackets are the dimension letters used in names and einsums (legend in model/transformer.py).
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from dsv3_jax.errors import UserError
from dsv3_jax.grpo_config import GRPOConfig
from dsv3_jax.task_config import TaskConfig

Weights = Literal["compute", "float8"]
"""How a model that runs holds its matrices: in the type it multiplies in, or as the blocks of an FP8 checkpoint."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run. The message names the field, its value and what would be right."""

    exit_code = 2


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of one DeepSeek-V3-family model (V3 section 4.2, V2 section 3.1.2)."""

    vocabulary: int
    """[W] rows of the embedding and the head; a tokenizer may use fewer, the rest is padding."""
    width: int
    """[D] size of the residual stream."""
    layers: int
    """[L] blocks of the main model, dense ones included, MTP modules not."""
    dense_layers: int
    """Leading blocks with a dense feed-forward network instead of experts."""
    dense_ffn_width: int
    """Hidden width of the dense feed-forward network."""

    heads: int
    """[H] attention heads."""
    query_latent: int | None
    """[Q] rank of the query latent; None: one direct query projection, without a norm (V2-Lite)."""
    key_value_latent: int
    """[C] rank of the key-value latent, the part of the cache shared by all heads."""
    nope_head_dim: int
    """[P] per-head query/key dims without rotary position."""
    rope_head_dim: int
    """[R] rotary dims: per head in queries, one vector shared by all heads in keys."""
    value_head_dim: int
    """[V] per-head value dims."""

    experts: int
    """[E] routed experts a MoE block."""
    experts_per_token: int
    """[K] routed experts a token."""
    shared_experts: int
    """Experts every token passes, fused into one network of this many times expert_ffn_width."""
    expert_ffn_width: int
    """[F] hidden width of one expert."""
    expert_groups: int
    """[G] groups of consecutive experts (one a node in V3)."""
    groups_per_token: int
    """Groups a token may choose its experts from."""
    score_function: Literal["sigmoid", "softmax"]
    """Router score of an expert: sigmoid (V3) or softmax over all experts (V2)."""
    group_score: Literal["top2_sum", "max"]
    """Score of a group: sum of its two largest selection scores (V3) or the largest (V2)."""
    normalize_weights: bool
    """Divide the chosen experts' scores by their sum (V3)."""
    routed_scale: float
    """Factor on the routed experts' weights: 2.5 in V3, 16 in V2, 1 in V2-Lite."""
    selection_bias: bool
    """Bias added to the scores for selection only, moved by the counted load (V3 section 2.1.2)."""

    mtp_depth: int
    """Multi-token prediction modules, each predicting one token further (V3 section 2.2)."""
    mtp_input: Literal["final_norm", "residual"] = "final_norm"
    """Hidden state fed to the first MTP module: after the final norm (released weights) or before it."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    yarn_factor: float = 1.0
    """YaRN context extension factor; 1 is plain RoPE and plain softmax scale."""
    yarn_original_length: int = 4096
    """Context length the frequencies were trained at before extension."""
    yarn_beta_fast: float = 32.0
    """Rotations over the original length above which a frequency is left alone."""
    yarn_beta_slow: float = 1.0
    """Rotations over the original length below which a frequency is divided by yarn_factor."""
    yarn_mscale: float = 1.0
    """Scale coefficient of cos and sin, as a ratio to yarn_mscale_all_dim."""
    yarn_mscale_all_dim: float = 1.0
    """Scale coefficient of the whole attention logit, squared."""
    maximum_positions: int = 163840
    """Longest sequence or cache allowed."""

    norm_epsilon: float = 1e-6
    """Epsilon of the block norms and the final norm."""
    latent_norm_epsilon: float = 1e-6
    """Epsilon of the two latent norms, which other code does not always tie to norm_epsilon."""
    initializer_std: float = 0.006
    """Standard deviation of every weight at the start (V3 section 4.2)."""
    precision: Literal["float32", "bfloat16", "fp8"] = "bfloat16"
    """Type the matmuls compute in; parameters, router, norm statistics, softmax and losses stay float32. fp8 is the
    whole recipe of V3 section 3.3: the products of linear layers and experts in FP8, all else in bfloat16, moments in
    bfloat16 whatever optimizer.moments says, and remat at least up_projections."""
    float8_scales: Literal["float32", "power_of_two"] = "float32"
    """Scales of FP8's tiles: amax / 448, or that rounded up to a power of two (UE8M0, V3.1)."""
    float8_tiles: Literal["fine", "gradient_blocks", "tensor"] = "fine"
    """Numbers that share a scale in FP8: 128 of a token's or a channel's, 128 x 128 of weights. The others are
    ablations (V3 appendix B.2): gradients in 128 x 128 as well; one scale for a whole tensor, as a device has it."""
    remat: Literal["none", "up_projections", "block"] = "block"
    """What backward recomputes: nothing; norms, MLA's up-projections and SwiGLU (V3 section 3.2.3), keeping latents,
    attention's output and the inputs of SwiGLU; or everything inside each block."""
    dispatch_factor: float = 2.0
    """Rows of tokens that a device takes in for its experts at one time, as a multiple of what balanced routing would
    send it. Nothing is dropped: what does not fit waits for another round."""
    dispatch_once_a_node: bool = True
    """Send a token once to each node it has experts on, and there on to its experts; otherwise once to each expert."""

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Name of the type of the residual stream, and of products outside of FP8."""
        return "bfloat16" if self.precision == "fp8" else self.precision

    @property
    def to_run(self) -> "ModelConfig":
        """The same model where it is not trained: of FP8's recipe nothing is left but the numbers it led to."""
        return dataclasses.replace(self, precision=self.dtype)

    @property
    def recomputed(self) -> Literal["none", "up_projections", "block"]:
        """`remat`, of which FP8's recipe has at least the norms and MLA's up-projections."""
        return "up_projections" if self.precision == "fp8" and self.remat == "none" else self.remat

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def query_key_head_dim(self) -> int:
        return self.nope_head_dim + self.rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values cached a token a layer: the normed latent and the rotated shared key."""
        return self.key_value_latent + self.rope_head_dim


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
