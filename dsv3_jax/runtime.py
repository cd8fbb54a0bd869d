"""What a process sets up once, before jax starts: memory pages, a compiler pass, the compilation cache, threads."""

import ctypes
import os
import sys
from pathlib import Path

from dsv3_jax.model_config import ModelConfig

HUGE_PAGES = "glibc.malloc.hugetlb=1"
# Active parameters of a model up to which one thread infers faster than several.
SMALL_MODEL = 5_000_000
THREADS = "PJRT_NPROC"
# Options of glibc's mallopt.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
MULTI_OUTPUT_FUSION = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"


def use_huge_pages() -> None:
    """Start this program again with huge pages for large allocations, where Linux grants them only on request.

    XLA:CPU allocates a step's temporaries anew each step, and touching them in 4 KiB pages takes a third of a small
    model's training time (benchmarks/huge_pages.py). glibc reads this setting only when a process starts. Does nothing
    on other systems, under a jax platform other than the CPU, or where GLIBC_TUNABLES already speaks of it.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "hugetlb" in tunables or not setting.exists() or "[madvise]" not in setting.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{HUGE_PAGES}" if tunables else HUGE_PAGES
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks that were freed, instead of giving them back to the system and asking again.

    A conversion allocates and frees a block at every step; the system clears each anew. With this it has a fifth of the
    page faults, spends less than two thirds of the processor time, and peaks 100 to 200 MB lower: fewer arenas hold
    freed blocks. Does nothing under another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((ARENA_MAX, 1), (TRIM_THRESHOLD, 2**31 - 1), (MMAP_THRESHOLD, 2**30)):
        mallopt(option, value)


def set_up_compiler() -> None:
    """What every program does before its first array."""
    use_multi_output_fusion()
    use_compilation_cache()


def use_multi_output_fusion() -> None:
    """Let XLA:CPU compute several results of the same arrays in one pass, the optimizer's three above all.

    It can, but does not unless asked: `small` spends 4 to 7% less CPU time on a step, `tiny` 7%, and compiling takes a
    fifth less (each as the median of interleaved steps). Other backends do not read this option. Does nothing where
    XLA_FLAGS already gives backend options.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {MULTI_OUTPUT_FUSION}".strip()


def use_one_thread(model: ModelConfig) -> None:
    """Let XLA:CPU run on one thread, if this process only infers with a model as small as `tiny`.

    A token of a small model is hundreds of operations of less than a microsecond, and with several threads XLA hands
    some of them over and waits: `tiny` decodes 1.2 times as fast with one thread, and is no slower at prompts of 1000
    tokens and at 8 prompts. Larger models would miss the other threads at prompts. XLA reads this when it starts. Does
    nothing where the environment already gives it a number.
    """
    from dsv3_jax.training.flops import parameter_counts

    if parameter_counts(model).active <= SMALL_MODEL:
        os.environ.setdefault(THREADS, "1")


def use_compilation_cache() -> None:
    """Keep compiled functions in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/dsv3_jax/xla."""
    import jax

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
