"""R1's first reinforcement learning in miniature, from the cold start, which it stays near to.

python train.py --config=tiny_r1_reasoning --init=runs/tiny_r1/cold_start
R1 rewards the language of the thinking as well (grpo.language_weight); sums have no words.
"""

import dataclasses

from configs.tiny_grpo import RESPONSES, ROW
from configs.tiny_r1_zero import config as zero

UPDATES = 40

config = dataclasses.replace(
    zero,
    training=dataclasses.replace(zero.training, tokens=UPDATES * RESPONSES * ROW),
    grpo=dataclasses.replace(zero.grpo, format_weight=0.1, kl_weight=0.001),
)
