"""The whole of DeepSeek-V3 in miniature, trained on the Python standard library's source.

python train.py --config=tiny
Hardware: any laptop CPU. Expected: see the README's measured figures.
"""

from dsv3_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, TrainingConfig

config = Config(
    model=ModelConfig(
        vocabulary=2048,
        width=160,
        layers=4,
        dense_layers=1,
        dense_ffn_width=448,
        heads=4,
        query_latent=96,
        key_value_latent=64,
        nope_head_dim=32,
        rope_head_dim=16,
        value_head_dim=32,
        experts=16,
        experts_per_token=4,
        shared_experts=1,
        expert_ffn_width=96,
        expert_groups=4,
        groups_per_token=2,
        score_function="sigmoid",
        group_score="top2_sum",
        normalize_weights=True,
        routed_scale=2.5,
        selection_bias=True,
        mtp_depth=1,
        maximum_positions=4096,
        initializer_std=0.02,
        precision="float32",
        remat="none",
    ),
    data=DataConfig(),
    training=TrainingConfig(tokens=2_000_000, sequence_length=256, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=40),
    loss=LossConfig(),
)
