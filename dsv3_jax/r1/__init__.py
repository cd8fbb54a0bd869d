"""The pipeline that made R1 of V3's base model, and students of R1: `python -m dsv3_jax.r1`."""
