"""DeepSeek-V3 as released: 671B parameters, 37B active a token (V3 section 4.2).

python train.py --config=v3_671b --data.path=CORPUS --data.tokenizer=tokenizer.json
Hardware: a pod. Pre-training at 4096 tokens with plain RoPE; YaRN factor 40 from the first long-context phase on.
The paper raises the batch from 3072 to 15360 rows over the first 469B tokens; this config starts at the final size.
"""

from dsv3_jax.config import Config, DataConfig, OptimizerConfig, TrainingConfig
from dsv3_jax.model_config import ModelConfig

config = Config(
    model=ModelConfig(
        vocabulary=129280,
        width=7168,
        layers=61,
        dense_layers=3,
        dense_ffn_width=18432,
        heads=128,
        query_latent=1536,
        key_value_latent=512,
        nope_head_dim=128,
        rope_head_dim=64,
        value_head_dim=128,
        experts=256,
        experts_per_token=8,
        shared_experts=1,
        expert_ffn_width=2048,
        expert_groups=8,
        groups_per_token=4,
        score_function="sigmoid",
        group_score="top2_sum",
        normalize_weights=True,
        routed_scale=2.5,
        selection_bias=True,
        mtp_depth=1,
    ),
    data=DataConfig(),
    training=TrainingConfig(tokens=14_800_000_000_000, sequence_length=4096, batch_size=15360),
    optimizer=OptimizerConfig(learning_rate=2.2e-4, warmup_steps=2000, moments="bfloat16"),
)
