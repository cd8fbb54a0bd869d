"""Seconds from the start of `python train.py` to its first finished step, without and with the compilation cache.

python -m benchmarks.start_up [CONFIG]

The run starts in a new workdir each time, so the tokenizer is trained in both.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def first_step_seconds(config: str, cache: str) -> float:
    with tempfile.TemporaryDirectory() as workdir:
        metrics = Path(workdir) / "metrics.jsonl"
        command = [
            sys.executable,
            "train.py",
            f"--config={config}",
            f"--workdir={workdir}",
            "--training.log_interval=1",
        ]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode} before its first step")
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
        return seconds


def main() -> None:
    config = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            cold = first_step_seconds(config, cache)
            warm = first_step_seconds(config, cache)
        print(f"{config}: first step after {cold:.1f} s cold, {warm:.1f} s with the compilation cache", flush=True)


if __name__ == "__main__":
    main()
