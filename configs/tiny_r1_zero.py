"""R1-Zero in miniature is tiny_grpo: reinforcement learning straight on the base model, form and accuracy alike.

python train.py --config=tiny_r1_zero --init=runs/tiny_r1/base --workdir=runs/tiny_r1/zero
"""

from configs.tiny_grpo import config as config
