"""The most memory that a program had: `python -m tests.slow.peak_memory PROGRAM [ARGUMENT ...]` runs it and tells.

To Linux a program that is started ever had what the process that started it had. So this one, which is small, starts it
and asks; tests start this one.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def run_and_measure(command: list[str]) -> tuple[str, int]:
    """Run it in the repository's root. Returns its standard output, and the most memory it had in bytes.

    Raises AssertionError, with all that it printed: it failed.
    """
    measured = subprocess.run(
        [sys.executable, "-m", "tests.slow.peak_memory", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert measured.returncode == 0, measured.stdout + measured.stderr
    output, _, peak = measured.stdout.rstrip().rpartition("\n")
    return output, int(peak)


if __name__ == "__main__":
    status = subprocess.run(sys.argv[1:]).returncode
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * RSS_UNIT)
    sys.exit(os.EX_SOFTWARE if status < 0 else status)
