"""R1's cold start in miniature: the base model is fine-tuned on some right and readable responses of R1-Zero.

python train.py --config=tiny_r1_cold_start --init=runs/tiny_r1/base --data.path=runs/tiny_r1/cold_start.jsonl
"""

import dataclasses

from configs.tiny_r1_base import config as base
from dsv3_jax.config import DataConfig

config = dataclasses.replace(
    base,
    data=DataConfig(kind="chats", path="runs/tiny_r1/cold_start.jsonl"),
    training=dataclasses.replace(base.training, tokens=160_000),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=5e-4, warmup_steps=5),
    loss=dataclasses.replace(base.loss, bias_speed=0.0),
)
