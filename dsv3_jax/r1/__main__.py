"""From a base model to a reasoner and its students: `python -m dsv3_jax.r1`. Running it again goes on where it stopped.

Its options are those of R1Options (arguments.py), `--SECTION.OPTION=VALUE` of train.py for all stages, and
`--STAGE.SECTION.OPTION=VALUE` for one.
"""

import sys

from dsv3_jax.command_line import run_main
from dsv3_jax.r1.arguments import parse_r1
from dsv3_jax.r1.pipeline import Pipeline
from dsv3_jax.r1.report import write_report
from dsv3_jax.training.interruption import catch_signals


def main() -> None:
    arguments = parse_r1(sys.argv[1:])
    with catch_signals() as interrupted:
        pipeline = Pipeline(arguments, interrupted)
        pipeline.run()
    print(f"\n{write_report(arguments.folder, pipeline.figures())}")


if __name__ == "__main__":
    run_main(main)
