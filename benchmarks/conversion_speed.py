"""Conversion against bare loops that read the same tensors, convert them and write the same bytes, in the same run.

python -m benchmarks.conversion_speed FOLDER [--rounds=6] [--workers=2] [--layers=3] [--experts=8] [--vocabulary=8080]

FOLDER is made, and removed at the end; it takes up to five times the checkpoint, which has 3 GB with these sizes.
Prints for each conversion its bytes written a second, the ratio of its speed to its loop's (median and range of
interleaved rounds), the most memory it had, and what the released weights would take at that rate.

Both sides run in new processes with the same number of threads, and are timed from after their imports to the last
flush to disk. What they read was written just before: it comes from memory as far as that reaches. On /dev/shm there
is no disk, and the ratios are those of the work alone.
"""

import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import tyro

from benchmarks.bare_loop import as_it_is, bare_loop, dequantizing, quantizing, without
from benchmarks.interleaved import interleaved, ratio
from benchmarks.large_checkpoint import Size, fabricate, model_of
from dsv3_jax.command_line import run_main
from dsv3_jax.convert.exporting import export_checkpoint
from dsv3_jax.convert.importing import import_checkpoint
from dsv3_jax.convert.projection import duration
from dsv3_jax.convert.tensors import copies_of, leaves_of
from dsv3_jax.runtime import keep_freed_memory

V3_BYTES = 688_574_839_360
"""Of the tensors in the released files."""
SMALL = Size(layers=3, experts=8, vocabulary=8080)
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def loop_in(source: Path, out: Path, workers: int, size: Size) -> None:
    bare_loop(source, out, workers, without(copies_of(model_of(size))))


def loop_as_it_is(source: Path, out: Path, workers: int) -> None:
    bare_loop(source, out, workers, as_it_is)


def loop_dequantizing(source: Path, out: Path, workers: int) -> None:
    bare_loop(source, out, workers, dequantizing(source))


def loop_quantizing(source: Path, out: Path, workers: int, size: Size) -> None:
    quantized = {name for leaf in leaves_of(model_of(size)) if leaf.quantized for name, _ in leaf.tensors()}
    bare_loop(source, out, workers, quantizing(quantized))


def timed(run: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and the most memory that this process ever had."""
    keep_freed_memory()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def compare(loop: Callable[..., None], conversion: Callable[..., None], out: Path, rounds: int, whole: float) -> None:
    """Run both in turns, an even number of rounds, and print what is found; a conversion's result stays in `out`.

    Args:
        whole: how many times the checkpoint the released weights are.
    """
    written: list[int] = []
    peaks: dict[str, int] = {"loop": 0, "conversion": 0}
    of_loop_alone = out.with_name("loop")

    def side(name: str, run: Callable[..., None], to: Path) -> float:
        for folder in (out, of_loop_alone):
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()  # so that the disk is done with what was deleted
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            seconds, peak = process.submit(timed, partial(run, out=to)).result()
        written.append(sum(file.stat().st_size for file in to.rglob("*") if file.is_file()))
        peaks[name] = max(peaks[name], peak)
        return seconds

    sides = {
        "conversion": partial(side, "conversion", conversion, out),
        "loop": partial(side, "loop", loop, of_loop_alone),
    }
    found = interleaved(sides, rounds)
    assert max(written) < 1.01 * min(written), f"the two sides write different numbers of bytes: {written}"
    seconds, of_loop = (statistics.median(found[name]) for name in ("conversion", "loop"))
    print(
        f"  conversion / loop {ratio(found['loop'], found['conversion'])}\n"
        f"  writes {written[-1] / 1e9:.2f} GB at {written[-1] / seconds / 1e6:,.0f} MB/s (loop "
        f"{written[-1] / of_loop / 1e6:,.0f}), peak memory {peaks['conversion'] / 1e6:,.0f} MB (loop "
        f"{peaks['loop'] / 1e6:,.0f}); V3 would take {duration(seconds * whole)}",
        flush=True,
    )


def main(
    folder: tyro.conf.Positional[Path],
    size: tyro.conf.OmitArgPrefixes[Size] = SMALL,
    rounds: int = 6,
    workers: int = os.cpu_count() or 1,
) -> None:
    folder.mkdir()
    try:
        fp8, fp8_saved, bf16, bf16_saved = (folder / name for name in ("fp8", "fp8_saved", "bf16", "bf16_saved"))
        total = fabricate(fp8, size)
        whole = V3_BYTES / total
        print(f"{total / 1e9:.2f} GB in FP8, {workers} threads, {rounds} rounds, on {folder}", flush=True)

        def stage(title: str, read: Path, loop: Callable[..., None], conversion: partial[None], out: Path) -> None:
            print(title, flush=True)
            compare(partial(loop, read, workers=workers), partial(conversion, workers=workers), out, rounds, whole)

        stage("import, FP8", fp8, partial(loop_in, size=size), partial(import_checkpoint, fp8), fp8_saved)
        stage("export, as it is", fp8, loop_as_it_is, partial(export_checkpoint, fp8_saved), folder / "exported")
        shutil.rmtree(folder / "exported")
        to_bf16 = partial(export_checkpoint, fp8_saved, dtype="bf16")
        stage("export, FP8 to BF16", fp8, loop_dequantizing, to_bf16, bf16)
        shutil.rmtree(fp8)
        shutil.rmtree(fp8_saved)
        import_checkpoint(bf16, bf16_saved, workers=workers)
        to_fp8 = partial(export_checkpoint, bf16_saved, dtype="fp8")
        stage("export, BF16 to FP8", bf16, partial(loop_quantizing, size=size), to_fp8, folder / "exported")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_main(lambda: tyro.cli(main, use_underscores=True))
