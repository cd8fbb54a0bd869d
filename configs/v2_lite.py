"""DeepSeek-V2-Lite: 16B parameters, 2.4B active a token (V2 appendix B).

python train.py --config=v2_lite --data.path=CORPUS --data.tokenizer=tokenizer.json
Hardware: one host of accelerators. Pre-training shape with plain RoPE; the released weights extend it with
yarn_factor=40, mscale 0.707. V2-Lite steps its learning rate down by 0.316 at 80% and 90%; this config uses
the V3 shape.
"""

from dsv3_jax.config import Config, DataConfig, LossConfig, OptimizerConfig, TrainingConfig
from dsv3_jax.model_config import ModelConfig

config = Config(
    model=ModelConfig(
        vocabulary=102400,
        width=2048,
        layers=27,
        dense_layers=1,
        dense_ffn_width=10944,
        heads=16,
        query_latent=None,
        key_value_latent=512,
        nope_head_dim=128,
        rope_head_dim=64,
        value_head_dim=128,
        experts=64,
        experts_per_token=6,
        shared_experts=2,
        expert_ffn_width=1408,
        expert_groups=1,
        groups_per_token=1,
        score_function="softmax",
        group_score="max",
        normalize_weights=False,
        routed_scale=1.0,
        selection_bias=False,
        mtp_depth=0,
        yarn_mscale=0.707,
        yarn_mscale_all_dim=0.707,
    ),
    data=DataConfig(),
    training=TrainingConfig(tokens=5_700_000_000_000, sequence_length=4096, batch_size=4608),
    optimizer=OptimizerConfig(learning_rate=4.2e-4, warmup_steps=2000),
    loss=LossConfig(balance_weight=0.001),
)
