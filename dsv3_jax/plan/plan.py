"""A program compiled for a machine that is not here: does it fit, and what bounds it."""

import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import Config, Weights
from dsv3_jax.layout import mesh_of, mesh_to_run
from dsv3_jax.model.functional import abstract_trees, in_float8, logical_axes, skeleton_of, to_run
from dsv3_jax.plan.collectives import Collective, collectives
from dsv3_jax.plan.hlo import Program
from dsv3_jax.plan.liveness import Array, peak_of
from dsv3_jax.plan.memory import Memory, bytes_by_part, memory_of
from dsv3_jax.plan.operations import matrix_flops
from dsv3_jax.plan.programs import traced_decode, traced_prefill, traced_training_step
from dsv3_jax.plan.roofline import Times, times
from dsv3_jax.plan.topology import Topology
from dsv3_jax.plan.traffic import memory_traffic
from dsv3_jax.training.flops import forward_flops, model_flops_per_token
from sharding.mesh import LayoutError, row_shards
from sharding.rules import EXPERT_AXES, TENSOR_AXES, check_layout

Kind = Literal["train", "prefill", "decode"]
LARGEST = 12


class Work(NamedTuple):
    """What a plan is made for."""

    config: Config
    kind: Kind
    rows: int
    """Rows of one run of the program: of all microbatches of a step, or the prompts."""
    positions: int
    """Tokens of a row, or positions in its cache."""
    mesh: Mesh
    machine: Topology
    weights: Weights = "compute"
    """How generation holds its matrices."""


class Plan(NamedTuple):
    work: Work
    state: dict[str, float]
    """Bytes a device of what the program is given: parameters, optimizer, ..."""
    needed: float
    """Bytes of main memory at the peak; where it does not fit, what the compiler says it would take."""
    memory: Memory | None
    """None, as all that follows, where it does not fit: there is no program then."""
    at_peak: list[Array]
    """The largest arrays that exist when most memory is in use, as far as the program's text tells."""
    flops: dict[str, float]
    """FLOPs of a device's matrix products, by type."""
    traffic: float | None
    """Bytes that a device moves from and to main memory."""
    collectives: list[Collective]
    times: Times | None
    model_flops: float
    """FLOPs of one device's share of the model, by formula: nothing recomputed, nothing wasted."""
    compile_seconds: float | None

    @property
    def capacity(self) -> float:
        chip = self.work.machine.chip
        return chip.memory / chip.devices

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.needed <= self.capacity


def plan_work(
    config: Config,
    machine: Topology,
    kind: Kind,
    rows: int | None,
    positions: int | None,
    weights: Weights = "compute",
) -> Work:
    """The program of a configuration; by default a step's own rows, and one prompt for every device that takes rows.

    Raises:
        LayoutError: the mesh does not fit the devices, the model or the batch.
        PlacementError: a mesh that models cannot generate on.
    """
    skeleton, positions = skeleton_of(config.model), positions or config.training.sequence_length
    if kind == "train":
        mesh = mesh_of(config, skeleton, machine.devices)
        return Work(config, kind, config.training.batch_size, positions, mesh, machine)
    mesh = mesh_to_run(config.mesh, machine.devices)
    check_layout(abstract_trees(skeleton)[0], logical_axes(to_run(skeleton)), mesh)
    rows, parts = rows or row_shards(mesh), row_shards(mesh)
    if rows % parts:
        raise LayoutError(f"--rows={rows} must be a multiple of {parts}, the parts that the mesh divides rows into")
    return Work(config, kind, rows, positions, mesh, machine, weights)


def make_plan(work: Work, compile_it: Callable[[jax.stages.Lowered], tuple[jax.stages.Compiled, float]]) -> Plan:
    """Trace, compile and read. `compile_it` returns what it compiled and the seconds it took."""
    config, skeleton = work.config, skeleton_of(work.config.model)
    given: Any
    if work.kind == "train":
        traced, given = traced_training_step(config, skeleton, work.mesh)
    else:
        trace, skeleton = traced_prefill if work.kind == "prefill" else traced_decode, to_run(skeleton)
        if work.weights == "float8":
            skeleton = in_float8(skeleton, work.mesh)
        traced, given = trace(config, skeleton, work.mesh, work.rows, work.positions)
    state = bytes_by_part(given)
    flops = matrix_flops(traced.jaxpr.jaxpr, _filled(work))
    try:
        compiled, seconds = compile_it(traced.lower())
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"required for HLO temporaries \(([\d.]+)([KMG])\)|Used ([\d.]+)([KMG]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        number, unit = needed.group(1) or needed.group(3), needed.group(2) or needed.group(4)
        bytes_needed = float(number) * 2.0 ** {"K": 10, "M": 20, "G": 30}[unit]
        return Plan(work, state, bytes_needed, None, [], flops, None, [], None, _model_flops(work), None)
    program = Program(compiled.as_text() or "")
    memory, traffic, found = memory_of(compiled), memory_traffic(program), collectives(program, work.mesh)
    return Plan(
        work,
        state,
        memory.peak,
        memory,
        peak_of(program).arrays[:LARGEST],
        flops,
        traffic,
        found,
        times(flops, traffic, found, work.mesh, work.machine),
        _model_flops(work),
        seconds,
    )


def _filled(work: Work) -> float:
    """Of the rows that a device has room for in one round of the dispatch, the share that balanced routing fills."""
    devices = math.prod(work.mesh.shape.get(axis, 1) for axis in EXPERT_AXES)
    return 1 / min(work.config.model.dispatch_factor, devices)


def _model_flops(work: Work) -> float:
    model = work.config.model
    if work.kind == "train":
        flops = model_flops_per_token(model, work.positions) * work.rows * work.positions
    else:
        flops = forward_flops(model, work.positions, decode=work.kind == "decode") * work.rows
    return flops / work.mesh.size


def what_would_fit(plan: Plan) -> list[str]:
    """Options that lower what a device needs, the cheapest first, with what they would make of it by arithmetic."""
    work, options = plan.work, []
    training, shards = work.config.training, row_shards(work.mesh)
    at_once = work.rows // (training.microbatches if work.kind == "train" else 1) // shards
    if at_once > 1 and work.kind == "train":
        options.append(
            f"--training.microbatches={work.rows // shards}: one row a device at a time instead of {at_once}"
        )
    elif at_once > 1:
        options.append(f"--rows={shards}: one row a device instead of {at_once}")
    if work.kind == "train" and work.config.model.remat != "block":
        options.append("--model.remat=block: activations inside blocks computed again instead of kept")
    if work.kind != "train" and work.weights != "float8":
        options.append("--weights=float8: matrices as blocks of FP8, half of what they take in bfloat16")
    # Over more devices state and gradients become smaller, activations do not. Where nothing is trained, what is not
    # experts or cache stays whole: to gather it at every token would take longer than all else.
    axis = "fsdp" if work.kind == "train" else "expert"
    divided = (
        sum(plan.state.values()) + plan.state["parameters"]
        if work.kind == "train"
        else plan.state["cache"] + _bytes_of_experts(work)
    )
    for times_as_many in (2, 4, 8, 16, 32):
        needed, pieces = plan.needed - divided * (1 - 1 / times_as_many), work.mesh.shape.get(axis, 1) * times_as_many
        if needed <= plan.capacity and _divides(work.config, {**work.mesh.shape, axis: pieces}):
            chips = work.machine.chips * times_as_many
            options.append(f"{chips} chips with --mesh.{axis}={pieces}: about {needed / 2**30:.0f} GiB, by arithmetic")
            break
    return options


def _bytes_of_experts(work: Work) -> float:
    """What a device holds of the routed experts where nothing is trained; scales of FP8 are not counted."""
    model = work.config.model
    numbers = 3 * model.width * model.expert_ffn_width * model.experts * (model.moe_layers + model.mtp_depth)
    size = 1 if work.weights == "float8" else jnp.dtype(model.dtype).itemsize
    return size * numbers / math.prod(work.mesh.shape.get(axis, 1) for axis in (*EXPERT_AXES, *TENSOR_AXES))


def _divides(config: Config, sizes: dict[str, int]) -> bool:
    """Whether the parameters can be divided over such a mesh."""
    skeleton = skeleton_of(config.model)
    try:
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        check_layout(abstract_trees(skeleton)[0], logical_axes(skeleton), mesh)
    except LayoutError:
        return False
    return True


def summary(plan: Plan) -> dict[str, Any]:
    """Everything as plain values, bytes and seconds a device, for JSON."""
    work, by_kind = plan.work, collectives_by_kind(plan.collectives)
    return {
        "program": work.kind,
        "topology": work.machine.name,
        "slices": work.machine.slices,
        "chips": work.machine.chips,
        "mesh": dict(work.mesh.shape),
        "rows": work.rows,
        "positions": work.positions,
        "fits": plan.fits,
        "memory_needed": plan.needed,
        "memory_capacity": plan.capacity,
        "memory": plan.memory._asdict() if plan.memory else None,
        "state": plan.state,
        "at_peak": [array._asdict() for array in plan.at_peak],
        "flops": plan.flops,
        "model_flops": plan.model_flops,
        "memory_traffic": plan.traffic,
        "collectives": [
            {"kind": kind, "axes": axes, "in_the_program": count, "executions": executions, "bytes_sent": sent}
            for (kind, axes), (count, executions, sent) in by_kind.items()
        ],
        "seconds": plan.times._asdict() if plan.times else None,
        "bound": plan.times.bound if plan.times else None,
        "compile_seconds": plan.compile_seconds,
        "would_fit": [] if plan.fits else what_would_fit(plan),
    }


def collectives_by_kind(found: list[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, int, float]]:
    """How many the program has of each kind and axes, how often they run, and the bytes they send; the most first."""
    total: dict[tuple[str, tuple[str, ...]], tuple[int, int, float]] = {}
    for each in found:
        count, executions, sent = total.get((each.kind, each.axes), (0, 0, 0.0))
        total[each.kind, each.axes] = (count + 1, executions + each.times, sent + each.times * each.bytes_sent)
    return dict(sorted(total.items(), key=lambda item: -item[1][2]))
