"""Collectives as XLA:TPU writes them; those of programs compiled here are tested with the layouts they belong to."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dsv3_jax.plan.collectives import Collective, collectives
from dsv3_jax.plan.hlo import Program

MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "expert"))

SCATTER = """HloModule m

%all-reduce-scatter.3.clone (input: f32[4,256]) -> f32[256] {
  %input = f32[4,256]{1,0} parameter(0)
  %ar = f32[4,256]{1,0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %ds = f32[256]{0} dynamic-slice(%ar)
}

ENTRY %main (a: f32[4,256]) -> f32[256] {
  %a = f32[4,256]{1,0} parameter(0)
  ROOT %f = f32[256]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3.clone
}
"""

RAGGED = """HloModule m

ENTRY %main (rows: bf16[64,8,128], into: bf16[128,8,128]) -> bf16[128,8,128] {
  %rows = bf16[64,8,128]{2,1,0} parameter(0)
  %into = bf16[128,8,128]{2,1,0} parameter(1)
  %o = s32[4]{0} constant({0, 0, 0, 0})
  ROOT %r = bf16[128,8,128]{2,1,0} ragged-all-to-all(%rows, %into, %o, %o, %o, %o), replica_groups=[2,4]<=[8]
}
"""


def test_an_all_reduce_fused_with_its_slice_is_a_reduce_scatter():
    (found,) = collectives(Program(SCATTER), MESH)
    # Of 4 KiB a device sends what the three others keep, once; an all-reduce would send it twice.
    assert found == Collective("reduce-scatter", ("expert",), 1, pytest.approx(4096 * 3 / 4))


def test_a_ragged_all_to_all_sends_at_most_the_rows_there_are_not_the_room_for_them():
    (found,) = collectives(Program(RAGGED), MESH)
    assert found == Collective("ragged-all-to-all", ("expert",), 1, pytest.approx(64 * 8 * 128 * 2 * 3 / 4))


SLICES = """HloModule m

ENTRY %main (a: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  %t = token[] after-all()
  %s = (f32[256]{0}, u32[], token[]) send(%a, %t), is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %ar = f32[256]{0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""  # noqa: E501


def test_the_program_of_several_slices_numbers_the_devices_of_one_and_sends_to_the_others():
    devices = [SimpleNamespace(slice_index=number // 4) for number in range(8)]
    grid = np.array(devices, dtype=object).reshape(2, 4)
    mesh = SimpleNamespace(axis_names=("data", "fsdp"), shape={"data": 2, "fsdp": 4}, devices=grid, size=8)
    assert collectives(Program(SLICES), mesh) == [
        Collective("all-reduce", ("data",), 1, 1024),
        Collective("all-reduce", ("fsdp",), 1, pytest.approx(2 * 1024 * 3 / 4)),
    ]
