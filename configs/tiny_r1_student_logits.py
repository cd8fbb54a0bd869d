"""Distillation by probabilities, in miniature: the student learns the teacher's own, on what the teacher got right.

python train.py --config=tiny_r1_student_logits --init=runs/tiny_r1/student --data.path=runs/tiny_r1/rejection.jsonl
"""

import dataclasses

from configs.tiny_r1_student_traces import config as traces

config = dataclasses.replace(traces, loss=dataclasses.replace(traces.loss, teacher="runs/tiny_r1/final"))
