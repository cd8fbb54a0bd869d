"""A plan in words."""

from dsv3_jax.plan.plan import Plan, collectives_by_kind, what_would_fit
from dsv3_jax.plan.roofline import utilisation

TIMES = {
    "products": "matrix products",
    "memory": "main memory",
    "links": "links between chips",
    "network": "network between slices",
}


def report(plan: Plan) -> str:
    """What a person wants to know before booking the machine."""
    work = plan.work
    axes = " x ".join(f"{axis} {size}" for axis, size in work.mesh.shape.items())
    chips = f"{work.machine.chips} chips" + (f" in {work.machine.slices} slices" if work.machine.slices > 1 else "")
    lines = [
        f"{work.kind} on {work.machine.name}, {chips}: mesh {axes}; {_work(plan)}",
        "",
        *_memory(plan),
    ]
    if plan.times:
        lines += ["", *_collectives(plan), "", *_times(plan)]
    if not plan.fits:
        lines += ["", "would fit:", *(f"  {option}" for option in what_would_fit(plan) or ["nothing tried here"])]
    return "\n".join(lines)


def _work(plan: Plan) -> str:
    work, training = plan.work, plan.work.config.training
    if work.kind == "train":
        return f"{work.rows} rows of {work.positions} tokens in {training.microbatches} microbatches"
    return f"{work.rows} rows, {work.positions} positions each"


def _memory(plan: Plan) -> list[str]:
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [f"memory, GiB a device: {_gib(plan.needed)} at the peak of {_gib(plan.capacity)}: {verdict}"]
    lines += [f"  {_gib(size):>8}  {name}" for name, size in plan.state.items() if size >= 2**10]
    if plan.memory:
        lines.append("the largest arrays at the peak:")
        lines += [f"  {_gib(array.bytes):>8}  {array.shape}  {array.origin}" for array in plan.at_peak]
    return lines


def _collectives(plan: Plan) -> list[str]:
    lines = ["collectives, what one device sends:", f"  {'GB':>8}  {'runs':>6}  kind and axes"]
    for (kind, axes), (count, executions, sent) in collectives_by_kind(plan.collectives).items():
        lines.append(
            f"  {_number(sent / 1e9):>8}  {executions:6}  {kind} over {', '.join(axes)} ({count} in the program)"
        )
    return lines


def _times(plan: Plan) -> list[str]:
    assert plan.times and plan.traffic and plan.compile_seconds is not None
    chip, flops = plan.work.machine.chip, sum(plan.flops.values())
    lines = [
        f"at {chip.name}'s full rates: {flops:.3g} FLOPs of matrix products ({flops / plan.model_flops:.2f} times the "
        f"model's own {plan.model_flops:.3g}), {_number(plan.traffic / 1e9)} GB of memory traffic"
    ]
    for name, words in TIMES.items():
        seconds = getattr(plan.times, name)
        bound = "  <- the bound" if name == plan.times.bound else ""
        lines.append(f"  {_number(seconds * 1e3):>10} ms  {words}{bound}")
    best, worst = (utilisation(plan.model_flops, s, chip) for s in (plan.times.overlapped, plan.times.in_turn))
    tokens = plan.work.rows * (1 if plan.work.kind == "decode" else plan.work.positions)
    if plan.work.kind == "decode":
        lines.append(f"at most {1 / plan.times.overlapped:.1f} tokens/s a row")
    lines.append(
        f"at most {best:.0%} model-FLOP utilisation and {tokens / plan.times.overlapped:,.0f} tokens/s if all of it "
        f"overlaps, {worst:.0%} if nothing does; compiled in {plan.compile_seconds:.0f} s"
    )
    return lines


def _number(value: float) -> str:
    """Three digits of a small one, all of a large one."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size >= 2**28 else f"{size / 2**30:.2g}"
