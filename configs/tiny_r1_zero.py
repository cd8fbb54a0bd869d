"""R1-Zero in miniature is tiny_grpo: reinforcement learning straight on the base model, form and accuracy alike.

python -m dsv3_jax.r1 --until=zero
"""

from configs.tiny_grpo import config as config
