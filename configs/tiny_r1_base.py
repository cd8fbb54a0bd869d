"""The base model of the R1 pipeline in miniature is nearly that of tiny_sft: it has seen solutions in every style.

python train.py --config=tiny_r1_base --workdir=runs/tiny_r1/base
"""

import dataclasses

from configs.tiny_sft import config as tiny_sft

config = dataclasses.replace(tiny_sft, data=dataclasses.replace(tiny_sft.data, answers_only=0.6))
