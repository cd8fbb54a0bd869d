"""The peak of programs written by hand, against sums by hand."""

import pytest

from dsv3_jax.plan.hlo import Program
from dsv3_jax.plan.liveness import peak_of

# a: 1 MiB, b and c: 4 MiB, d: 2 MiB, the loop's own e: 8 MiB for a while, f in fast memory.
PROGRAM = """HloModule jit_f, is_scheduled=true

%updated (p0.1: f32[1024,1024], p1.1: f32[1024], p2.1: s32[]) -> f32[1024,1024] {
  %p0.1 = f32[1024,1024]{1,0} parameter(0)
  %p1.1 = f32[1024]{0} parameter(1)
  %p2.1 = s32[] parameter(2)
  %r.1 = f32[1,1024]{1,0} reshape(%p1.1)
  %u.1 = f32[1024,1024]{1,0} dynamic-update-slice(%p0.1, %r.1, %p2.1, %p2.1)
  ROOT %b.1 = f32[1024,1024]{1,0} bitcast(%u.1)
}

%body (p.2: (s32[], f32[1024,1024], f32[1024])) -> (s32[], f32[1024,1024], f32[1024]) {
  %p.2 = (s32[], f32[1024,1024]{1,0}, f32[1024]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %stack.2 = f32[1024,1024]{1,0} get-tuple-element(%p.2), index=1
  %row.2 = f32[1024]{0} get-tuple-element(%p.2), index=2
  %e.2 = f32[2048,1024]{1,0} broadcast(%row.2), dimensions={1}, metadata={op_name="jit(f)/while/body/spread"}
  %f.2 = f32[4096,1024]{1,0:T(8,128)S(1)} broadcast(%row.2), dimensions={1}
  %sum.2 = f32[1024]{0} reduce(%e.2, %f.2), dimensions={0}, to_apply=%updated
  %new.2 = f32[1024,1024]{1,0} fusion(%stack.2, %sum.2, %i.2), kind=kLoop, calls=%updated
  ROOT %t.2 = (s32[], f32[1024,1024]{1,0}, f32[1024]{0}) tuple(%i.2, %new.2, %row.2)
}

%cond (p.3: (s32[], f32[1024,1024], f32[1024])) -> pred[] {
  %p.3 = (s32[], f32[1024,1024]{1,0}, f32[1024]{0}) parameter(0)
  ROOT %go.3 = pred[] constant(true)
}

ENTRY %main (a: f32[1024,256]) -> f32[1024,512] {
  %a = f32[1024,256]{1,0} parameter(0), metadata={op_name="state['weights']"}
  %b = f32[1024,1024]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %c = f32[1024,1024]{1,0} multiply(%b, %b)
  %row = f32[1024]{0} constant(0)
  %i = s32[] constant(0)
  %t = (s32[], f32[1024,1024]{1,0}, f32[1024]{0}) tuple(%i, %c, %row)
  %w = (s32[], f32[1024,1024]{1,0}, f32[1024]{0}) while(%t), condition=%cond, body=%body
  %after = f32[1024,1024]{1,0} get-tuple-element(%w), index=1
  ROOT %d = f32[1024,512]{1,0} slice(%after), slice={[0:1024], [0:512]}
}
"""

MIB = 2**20


def test_a_loop_holds_its_own_arrays_above_those_around_it_and_updates_its_stack_in_place():
    peak = peak_of(Program(PROGRAM))
    # a is there until its last use, b gives its place to c, which the loop updates; beside it the loop spreads a row.
    rows = 2 * 4096 + 4 + 1
    assert peak.bytes == pytest.approx(4 * MIB + 8 * MIB + rows, abs=8192)
    assert [(array.shape, array.origin) for array in peak.arrays[:2]] == [
        ("f32[2048,1024]", "spread"),
        ("f32[1024,1024]", "multiply"),
    ]


def test_without_the_loop_the_peak_is_where_an_argument_and_its_product_meet():
    text = PROGRAM.replace("f32[2048,1024]{1,0} broadcast", "f32[2,1024]{1,0} broadcast")
    peak = peak_of(Program(text))
    # d, 2 MiB, is cut out of the 4; before, 1 + 4.
    assert peak.bytes == pytest.approx(6 * MIB, abs=16384)
    before = text.replace("ROOT %d = f32[1024,512]{1,0} slice", "ROOT %d = f32[1024,5]{1,0} slice")
    found = peak_of(Program(before))
    assert found.bytes == pytest.approx(5 * MIB, abs=16384)
    assert ("f32[1024,256]", "state.weights") in [(array.shape, array.origin) for array in found.arrays]
