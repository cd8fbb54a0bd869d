"""R1's rejection sampling in miniature: the base model is fine-tuned anew, on what the reasoning model got right.

python train.py --config=tiny_r1_rejection --init=runs/tiny_r1/base --data.path=runs/tiny_r1/rejection.jsonl
"""

import dataclasses

from configs.tiny_r1_cold_start import config as cold_start
from dsv3_jax.config import DataConfig

config = dataclasses.replace(
    cold_start,
    data=DataConfig(kind="chats", path="runs/tiny_r1/rejection.jsonl"),
    training=dataclasses.replace(cold_start.training, tokens=400_000),
    optimizer=dataclasses.replace(cold_start.optimizer, learning_rate=1e-3),
)
