"""Fine-tuning in miniature: a small model learns to answer a task from worked solutions, well enough to be improved.

python train.py --config=tiny_sft
Hardware: any laptop CPU. The task is to add two numbers of three digits, and it is shown solutions as people write
them: 70% are an answer alone, half are in no particular form. So is what it says then; of what it works out three in
four are right, of the rest few. tiny_grpo makes it work out all, in R1's form, with fewer mistakes.
"""

from dsv3_jax.config import Config, DataConfig, LossConfig, OptimizerConfig, TrainingConfig
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.task_config import TaskConfig

config = Config(
    model=ModelConfig(
        vocabulary=304,
        width=96,
        layers=3,
        dense_layers=1,
        dense_ffn_width=192,
        heads=4,
        query_latent=48,
        key_value_latent=32,
        nope_head_dim=24,
        rope_head_dim=8,
        value_head_dim=24,
        experts=8,
        experts_per_token=2,
        shared_experts=1,
        expert_ffn_width=32,
        expert_groups=4,
        groups_per_token=2,
        score_function="sigmoid",
        group_score="top2_sum",
        normalize_weights=True,
        routed_scale=2.5,
        selection_bias=True,
        mtp_depth=1,
        maximum_positions=512,
        initializer_std=0.05,
        precision="float32",
        remat="none",
    ),
    # As in text that people write, most answers come without their working, and in no particular form.
    data=DataConfig(kind="chats", path="task", demonstrations=60_000, answers_only=0.7, formless=0.5),
    training=TrainingConfig(tokens=2_400_000, sequence_length=128, batch_size=8),
    optimizer=OptimizerConfig(
        learning_rate=4e-3,
        warmup_steps=40,
        constant_until=0.0,
        cosine_until=1.0,
        first_tail_until=1.0,
        first_tail_ratio=0.1,
    ),
    loss=LossConfig(bias_speed=0.01),
    task=TaskConfig(kind="arithmetic", arithmetic_operators="+", arithmetic_digits=3, arithmetic_least_digits=3),
)
