"""Training speed with and without huge pages for large allocations (dsv3_jax/runtime.py).

python -m benchmarks.huge_pages CONFIG

Starts benchmarks.training_speed's step in new processes, in turns. On a system whose transparent huge pages are not
on request ("madvise") the two are the same.
"""

import os
import subprocess
import sys

from benchmarks.interleaved import interleaved, ratio
from dsv3_jax.runtime import HUGE_PAGES

ROUNDS = 3
STEP = """
from benchmarks.training_speed import trainer, load_config, set_up_compiler
set_up_compiler()
train = trainer(load_config({name!r}))
print(max(train() for _ in range(3)))
"""


def main() -> None:
    (name,) = sys.argv[1:]

    def run(tunables: str) -> float:
        command = [sys.executable, "-c", STEP.format(name=name)]
        done = subprocess.run(
            command, env={**os.environ, "GLIBC_TUNABLES": tunables}, capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    found = interleaved({"with": lambda: run(HUGE_PAGES), "without": lambda: run("")}, ROUNDS)
    print(f"{name}: tokens/s with huge pages / without: {ratio(found['with'], found['without'])}")


if __name__ == "__main__":
    main()
