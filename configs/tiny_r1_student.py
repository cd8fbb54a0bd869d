"""The base model of the students: smaller than tiny_r1_base, and trained for a fifth of the time on the same text.

python train.py --config=tiny_r1_student --data.tokenizer=runs/tiny_r1/base/tokenizer.json
"""

import dataclasses

from configs.tiny_r1_base import config as base
from configs.tiny_student import config as tiny_student

config = dataclasses.replace(
    base, model=tiny_student.model, training=dataclasses.replace(base.training, tokens=480_000)
)
