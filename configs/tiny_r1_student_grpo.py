"""What distillation is compared with, in miniature: the student by reinforcement learning alone, for as long or longer.

python train.py --config=tiny_r1_student_grpo --init=runs/tiny_r1/student
"""

import dataclasses

from configs.tiny_grpo import RESPONSES, ROW
from configs.tiny_r1_student import config as student
from configs.tiny_r1_zero import config as zero

UPDATES = 150

config = dataclasses.replace(
    zero,
    model=student.model,
    training=dataclasses.replace(zero.training, tokens=UPDATES * RESPONSES * ROW, validation_interval=30),
)
