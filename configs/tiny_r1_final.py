"""R1's last reinforcement learning in miniature, at the lower temperature of the paper.

python train.py --config=tiny_r1_final --init=runs/tiny_r1/rejection
R1 adds general questions judged by reward models; here there is the task alone.
"""

import dataclasses

from configs.tiny_r1_reasoning import config as reasoning

config = dataclasses.replace(reasoning, grpo=dataclasses.replace(reasoning.grpo, temperature=0.7))
