"""The base model of the R1 pipeline in miniature is what tiny_sft trains: it has seen solutions in every style.

python -m dsv3_jax.r1 --until=base
"""

from configs.tiny_sft import config as config
