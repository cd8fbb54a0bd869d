"""DeepSeek-V2: 236B parameters, 21B active a token (V2 section 3.1.2).

python train.py --config=v2_236b --data.path=CORPUS --data.tokenizer=tokenizer.json
Hardware: a pod. Pre-training shape with plain RoPE; the released weights extend it with yarn_factor=40, mscale 0.707.
V2 steps its learning rate down by 0.316 at 60% and 90% of the run; this config uses the V3 shape.
V2 balanced with expert, device and communication losses; here the sequence-wise loss of V3 with V2's expert-level
weight.
"""

from dsv3_jax.config import Config, DataConfig, LossConfig, OptimizerConfig, TrainingConfig
from dsv3_jax.model_config import ModelConfig

config = Config(
    model=ModelConfig(
        vocabulary=102400,
        width=5120,
        layers=60,
        dense_layers=1,
        dense_ffn_width=12288,
        heads=128,
        query_latent=1536,
        key_value_latent=512,
        nope_head_dim=128,
        rope_head_dim=64,
        value_head_dim=128,
        experts=160,
        experts_per_token=6,
        shared_experts=2,
        expert_ffn_width=1536,
        expert_groups=8,
        groups_per_token=3,
        score_function="softmax",
        group_score="max",
        normalize_weights=False,
        routed_scale=16.0,
        selection_bias=False,
        mtp_depth=0,
        yarn_mscale=0.707,
        yarn_mscale_all_dim=0.707,
    ),
    data=DataConfig(),
    training=TrainingConfig(tokens=8_100_000_000_000, sequence_length=4096, batch_size=9216),
    optimizer=OptimizerConfig(learning_rate=2.4e-4, warmup_steps=2000),
    loss=LossConfig(balance_weight=0.003),
)
