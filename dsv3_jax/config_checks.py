"""What a configuration may not say: each refusal names the field, its value and what would be right."""

from dsv3_jax.config import Config, ConfigError, DataConfig, LossConfig, OptimizerConfig, TrainingConfig
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.task_config import TaskConfig


def check(config: Config) -> None:
    """Refuse a configuration that cannot run.

    Raises:
        ConfigError: names the field, its value and what would be right.
    """
    check_model(config.model)
    _check_float8(config.model)
    _check_training(config.training, config.model)
    _check_data(config.data, config.training)
    _check_optimizer(config.optimizer)
    _check_loss(config.loss)
    _at_least("checkpoint.interval", config.checkpoint.interval, 1)
    _at_least("checkpoint.keep", config.checkpoint.keep, 1)
    if config.seed < 0 or config.seed >= 2**32:
        raise ConfigError(f"seed={config.seed} must be between 0 and {2**32 - 1}")
    check_task(config.task)
    if config.data.kind == "rollouts":
        _check_grpo(config)


def _check_training(training: TrainingConfig, model: ModelConfig) -> None:
    for name in ("tokens", "sequence_length", "batch_size", "microbatches", "log_interval"):
        _at_least(f"training.{name}", getattr(training, name), 1)
    for name in ("validation_interval", "sample_tokens"):
        _at_least(f"training.{name}", getattr(training, name), 0)
    if training.batch_size % training.microbatches:
        raise ConfigError(
            f"training.microbatches={training.microbatches} must divide training.batch_size={training.batch_size}; "
            f"these do: {divisors(training.batch_size)}"
        )
    if training.steps < 1:
        raise ConfigError(
            f"training.tokens={training.tokens} is less than one step: it must be at least "
            f"batch_size * sequence_length = {training.batch_size * training.sequence_length}"
        )
    if training.sequence_length > model.maximum_positions:
        raise ConfigError(
            f"training.sequence_length={training.sequence_length} must be at most "
            f"model.maximum_positions={model.maximum_positions}"
        )
    if training.sequence_length <= model.mtp_depth:
        raise ConfigError(
            f"training.sequence_length={training.sequence_length} must exceed model.mtp_depth={model.mtp_depth}"
        )


def _check_data(data: DataConfig, training: TrainingConfig) -> None:
    for name in ("validation_share", "fill_in_the_middle_rate", "answers_only", "formless"):
        _between(f"data.{name}", getattr(data, name), 0.0, 1.0)
    if data.validation_share == 0.0:
        raise ConfigError("data.validation_share=0.0 must be above 0: a run ends with a validation")
    _at_least("data.streams", data.streams, 1)
    if training.batch_size % data.streams:
        raise ConfigError(
            f"data.streams={data.streams} must divide training.batch_size={training.batch_size}; "
            f"these do: {divisors(training.batch_size)}"
        )
    if not data.path:
        raise ConfigError("data.path='' is empty: give 'stdlib', or a file, folder or glob")
    _at_least("data.demonstrations", data.demonstrations, 1)
    if (data.kind, data.path) in (("chats", "stdlib"), ("documents", "task")):
        raise ConfigError(
            f"data.path={data.path} is not of data.kind={data.kind}: give 'task' or .jsonl files for chats, "
            "'stdlib' or text files for documents"
        )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    if not optimizer.learning_rate > 0:
        raise ConfigError(f"optimizer.learning_rate={optimizer.learning_rate} must be above 0")
    _at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    shares = (optimizer.constant_until, optimizer.cosine_until, optimizer.first_tail_until)
    if not 0.0 <= shares[0] <= shares[1] <= shares[2] <= 1.0:
        raise ConfigError(
            f"optimizer.constant_until, cosine_until, first_tail_until = {shares} must rise from 0 to 1: "
            "each is a share of the run"
        )
    for name in ("beta1", "beta2"):
        if not 0.0 <= getattr(optimizer, name) < 1.0:
            raise ConfigError(f"optimizer.{name}={getattr(optimizer, name)} must be at least 0 and below 1")
    for name in ("epsilon", "clip_norm"):
        if not getattr(optimizer, name) > 0:
            raise ConfigError(f"optimizer.{name}={getattr(optimizer, name)} must be above 0")
    _at_least("optimizer.weight_decay", optimizer.weight_decay, 0)


def _check_loss(loss: LossConfig) -> None:
    for name in ("balance_weight", "bias_speed", "mtp_weight", "mtp_late_weight"):
        _at_least(f"loss.{name}", getattr(loss, name), 0)
    if not loss.teacher_temperature > 0:
        raise ConfigError(f"loss.teacher_temperature={loss.teacher_temperature} must be above 0")
    for name in ("bias_until", "mtp_weight_until", "teacher_weight"):
        _between(f"loss.{name}", getattr(loss, name), 0.0, 1.0)


def check_model(model: ModelConfig) -> None:
    """Refuse a model shape that cannot be built. Raises ConfigError."""
    positive = (
        "vocabulary width layers dense_ffn_width heads key_value_latent nope_head_dim rope_head_dim value_head_dim "
        "experts experts_per_token expert_ffn_width expert_groups groups_per_token maximum_positions"
    )
    for name in positive.split():
        _at_least(f"model.{name}", getattr(model, name), 1)
    for name in ("dense_layers", "shared_experts", "mtp_depth"):
        _at_least(f"model.{name}", getattr(model, name), 0)
    if model.query_latent is not None:
        _at_least("model.query_latent", model.query_latent, 1)
    if model.rope_head_dim % 2:
        raise ConfigError(f"model.rope_head_dim={model.rope_head_dim} must be even: rotary dims come in pairs")
    _at_most("model.dense_layers", model.dense_layers, "model.layers", model.layers)
    if model.experts % model.expert_groups:
        raise ConfigError(
            f"model.expert_groups={model.expert_groups} must divide model.experts={model.experts}; "
            f"these do: {divisors(model.experts)}"
        )
    group_size = model.experts // model.expert_groups
    if model.group_score == "top2_sum" and model.expert_groups > 1 and group_size < 2:
        raise ConfigError(
            f"model.expert_groups={model.expert_groups} leaves {group_size} expert a group, and group_score='top2_sum' "
            f"needs 2: use at most {model.experts // 2} groups, or group_score='max'"
        )
    _at_most("model.groups_per_token", model.groups_per_token, "model.expert_groups", model.expert_groups)
    _at_most(
        "model.experts_per_token",
        model.experts_per_token,
        "the experts in the chosen groups (groups_per_token * experts / expert_groups)",
        model.groups_per_token * group_size,
    )
    if not model.yarn_factor >= 1.0:
        raise ConfigError(f"model.yarn_factor={model.yarn_factor} must be at least 1 (1 is plain RoPE)")
    if not model.dispatch_factor >= 1.0:
        raise ConfigError(
            f"model.dispatch_factor={model.dispatch_factor} must be at least 1, which fits balanced routing"
        )
    for name in ("rope_theta", "norm_epsilon", "latent_norm_epsilon", "initializer_std", "routed_scale"):
        if not getattr(model, name) > 0:
            raise ConfigError(f"model.{name}={getattr(model, name)} must be above 0")


def check_task(task: TaskConfig) -> None:
    """Refuse problems that cannot be made. Raises ConfigError."""
    for name in (
        *("validation_problems", "held_out_problems", "countdown_largest_number", "countdown_largest_target"),
        "arithmetic_digits",
        "arithmetic_least_digits",
    ):
        _at_least(f"task.{name}", getattr(task, name), 1)
    _at_least("task.countdown_failures", task.countdown_failures, 0)
    _between("task.seed", task.seed, 0, 2**32 - 1)
    _between("task.countdown_numbers", task.countdown_numbers, 2, 10)
    _at_most(
        "task.countdown_largest_number",
        task.countdown_largest_number,
        "task.countdown_largest_target",
        task.countdown_largest_target,
    )
    _at_most(
        "task.arithmetic_least_digits", task.arithmetic_least_digits, "task.arithmetic_digits", task.arithmetic_digits
    )
    _at_most("task.arithmetic_digits", task.arithmetic_digits, "what a response may spell", 40)
    _at_least("task.verifier_processes", task.verifier_processes, 1)
    if not task.verifier_seconds > 0:
        raise ConfigError(f"task.verifier_seconds={task.verifier_seconds} must be above 0")
    if task.kind == "json_lines" and not task.path:
        raise ConfigError("task.path='' is empty: task.kind=json_lines needs a .jsonl file")
    if task.kind == "gym" and not task.gym_dataset:
        raise ConfigError("task.gym_dataset='' is empty: task.kind=gym needs the name of a dataset, such as chain_sum")
    if not task.arithmetic_operators or set(task.arithmetic_operators) - set("+-*"):
        raise ConfigError(f"task.arithmetic_operators={task.arithmetic_operators!r} must be some of + - *")


def _check_grpo(config: Config) -> None:
    """Refuse rollouts that cannot be made or learnt from. Raises ConfigError."""
    grpo, training = config.grpo, config.training
    _at_least("grpo.group_size, whose responses are compared with each other,", grpo.group_size, 2)
    for name in ("prompts", "updates_per_rollout", "prompt_tokens", "max_new_tokens"):
        _at_least(f"grpo.{name}", getattr(grpo, name), 1)
    for name in (
        *("clip_low", "clip_high", "kl_weight", "reference_interval", "accuracy_weight", "format_weight"),
        *("language_weight", "overlong_penalty", "overlong_tokens"),
    ):
        _at_least(f"grpo.{name}", getattr(grpo, name), 0)
    for name in ("temperature", "importance_cap"):
        value = getattr(grpo, name)
        if value is not None and not value > 0:
            raise ConfigError(f"grpo.{name}={value} must be above 0")
    _at_most("grpo.overlong_tokens", grpo.overlong_tokens, "grpo.max_new_tokens", grpo.max_new_tokens)
    responses, learnt = grpo.prompts * grpo.group_size, grpo.updates_per_rollout * training.batch_size
    if responses != learnt:
        raise ConfigError(
            f"training.batch_size={training.batch_size}, the responses of an update, times "
            f"grpo.updates_per_rollout={grpo.updates_per_rollout} must be grpo.prompts * grpo.group_size = {responses}"
        )
    if training.steps % grpo.updates_per_rollout:
        raise ConfigError(
            f"training.tokens={training.tokens} makes {training.steps} updates, which must be a multiple of "
            f"grpo.updates_per_rollout={grpo.updates_per_rollout}"
        )
    longest = grpo.prompt_tokens + grpo.max_new_tokens
    if longest - 1 > training.sequence_length:
        raise ConfigError(
            f"training.sequence_length={training.sequence_length} must be at least {longest - 1}: a response of "
            f"grpo.max_new_tokens={grpo.max_new_tokens} to a prompt of grpo.prompt_tokens={grpo.prompt_tokens} has to "
            "fit a row"
        )


def _check_float8(model: ModelConfig) -> None:
    for name in ("float8_scales", "float8_tiles"):
        value, default = getattr(model, name), getattr(ModelConfig, name)
        if model.precision != "fp8" and value != default:
            raise ConfigError(
                f"model.{name}={value} means nothing with model.precision={model.precision}: it needs "
                "model.precision=fp8"
            )


def divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} must be at least {least}")


def _at_most(name: str, value: float, limit_name: str, limit: float) -> None:
    if value > limit:
        raise ConfigError(f"{name}={value} must be at most {limit_name} = {limit}")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}={value} must be between {low} and {high}")
