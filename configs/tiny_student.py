"""Distillation in miniature: a smaller model learns the probabilities of the one that tiny_sft trained.

python train.py --config=tiny_student --loss.teacher=runs/tiny_sft
Or on what it answered correctly: python -m dsv3_jax.tasks --checkpoint=runs/tiny_sft --split=train --save=right.jsonl,
then --data.path=right.jsonl --data.tokenizer=runs/tiny_sft/tokenizer.json --loss.teacher=None.
"""

import dataclasses

from configs.tiny_sft import config as tiny_sft

config = dataclasses.replace(
    tiny_sft,
    model=dataclasses.replace(
        tiny_sft.model,
        width=64,
        layers=2,
        dense_ffn_width=128,
        query_latent=32,
        key_value_latent=24,
        nope_head_dim=16,
        value_head_dim=16,
    ),
    loss=dataclasses.replace(tiny_sft.loss, teacher="runs/tiny_sft"),
)
