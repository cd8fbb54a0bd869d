"""A DeepSeek-V3 of 191M parameters, of which a token passes 29M: hours on a laptop CPU, minutes on a GPU.

python train.py --config=small
"""

from dsv3_jax.config import Config, DataConfig, OptimizerConfig, TrainingConfig
from dsv3_jax.model_config import ModelConfig

config = Config(
    model=ModelConfig(
        vocabulary=4096,
        width=512,
        layers=8,
        dense_layers=1,
        dense_ffn_width=1408,
        heads=8,
        query_latent=192,
        key_value_latent=128,
        nope_head_dim=64,
        rope_head_dim=32,
        value_head_dim=64,
        experts=64,
        experts_per_token=6,
        shared_experts=1,
        expert_ffn_width=256,
        expert_groups=8,
        groups_per_token=4,
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
    training=TrainingConfig(tokens=40_960_000, sequence_length=512, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200),
)
