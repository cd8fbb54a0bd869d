"""The end of a run: validation against general-purpose compressors, plots, a sample, summary.json."""

from pathlib import Path

from tokenizers import Tokenizer

from dsv3_jax.config import Config
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.pipeline import validation_bytes
from dsv3_jax.model.functional import Skeleton
from dsv3_jax.training.compression import bits_per_byte
from dsv3_jax.training.evaluation import Evaluation
from dsv3_jax.training.files import write_summary
from dsv3_jax.training.flops import model_flops_per_token, parameter_counts
from dsv3_jax.training.loop import LoopResult
from dsv3_jax.training.plots import write_expert_load, write_loss_curve


def write_report(
    result: LoopResult,
    config: Config,
    workdir: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    skeleton: Skeleton,
    evaluation: Evaluation,
    matmul_rate: float,
) -> None:
    """Print the run's figures and write summary.json, loss.png and expert_load.png into the workdir."""
    text = validation_bytes(corpus.validation)
    speed = result.timed_tokens / result.seconds if result.seconds else 0.0
    flops = model_flops_per_token(config.model, config.training.sequence_length)
    counts = parameter_counts(config.model)
    summary = {
        "validation_bits_per_byte": evaluation.bits_per_byte(len(text)),
        "zlib_bits_per_byte": bits_per_byte("zlib", text),
        "xz_bits_per_byte": bits_per_byte("xz", text),
        "validation_loss": evaluation.loss,
        "tokens": config.training.steps * config.training.batch_size * config.training.sequence_length,
        "seconds": result.seconds,
        "tokens_per_second": speed,
        "matmul_rate_share": speed * flops / matmul_rate,
        "parameters": counts.main + counts.mtp,
    }
    write_summary(workdir, summary)
    write_loss_curve(workdir / "metrics.jsonl", workdir / "loss.png")
    if result.load_history:
        write_expert_load(result.load_history, workdir / "expert_load.png")
    print(summary)
