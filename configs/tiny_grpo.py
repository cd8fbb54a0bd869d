"""Reinforcement learning in miniature: the model of tiny_sft gets better at its task by what its own answers are worth.

python train.py --config=tiny_grpo --init=runs/tiny_sft
"""

from configs.tiny_sft import config as tiny_sft
from dsv3_jax.config import CheckpointConfig, Config, DataConfig, OptimizerConfig, TrainingConfig
from dsv3_jax.grpo_config import GRPOConfig

UPDATES, RESPONSES, ROW = 60, 256, 80

config = Config(
    model=tiny_sft.model,
    data=DataConfig(kind="rollouts"),
    training=TrainingConfig(
        tokens=UPDATES * RESPONSES * ROW,
        sequence_length=ROW,
        batch_size=RESPONSES,
        microbatches=16,
        log_interval=1,
        validation_interval=10,
    ),
    optimizer=OptimizerConfig(
        learning_rate=5e-4,
        warmup_steps=5,
        constant_until=1.0,
        cosine_until=1.0,
        first_tail_until=1.0,
        beta2=0.99,
        weight_decay=0.0,
    ),
    checkpoint=CheckpointConfig(interval=20),
    task=tiny_sft.task,
    grpo=GRPOConfig(
        prompts=32,
        group_size=8,
        prompt_tokens=24,
        max_new_tokens=56,
        clip_high=0.28,
        format_weight=1.0,
    ),
)
