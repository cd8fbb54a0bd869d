"""Distillation as in R1, in miniature: the student is fine-tuned on what the teacher got right.

python train.py --config=tiny_r1_student_traces --init=runs/tiny_r1/student --data.path=runs/tiny_r1/rejection.jsonl
"""

import dataclasses

from configs.tiny_r1_rejection import config as rejection
from configs.tiny_r1_student import config as student

config = dataclasses.replace(
    student,
    data=rejection.data,
    training=dataclasses.replace(student.training, tokens=800_000),
    optimizer=dataclasses.replace(student.optimizer, learning_rate=2e-3),
)
