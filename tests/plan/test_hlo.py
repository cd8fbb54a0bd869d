"""Compiled programs read from their text: written by hand, and compiled here."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.plan.hlo import Program, bytes_of, slow_bytes_of

LOOPS = """HloModule jit_step

%cond_of_inner (p.1: (s32[], f32[4])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %five), direction=LT
}

%body_of_inner (p.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.2 = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  ROOT %t.2 = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%p.2)
}

%cond_of_unknown (p.3: (s32[], s32[])) -> pred[] {
  %p.3 = (s32[], s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %n.3 = s32[] get-tuple-element(%p.3), index=1
  ROOT %lt.3 = pred[] compare(%i.3, %n.3), direction=LT
}

%body_of_unknown (p.4: (s32[], s32[])) -> (s32[], s32[]) {
  %p.4 = (s32[], s32[]) parameter(0)
  ROOT %t.4 = (s32[], s32[]) tuple(%p.4)
}

%cond_of_outer (p.5: (s32[], f32[4])) -> pred[] {
  %p.5 = (s32[], f32[4]) parameter(0)
  %i.5 = s32[] get-tuple-element(%p.5), index=0
  %three = s32[] constant(3)
  ROOT %lt.5 = pred[] compare(%i.5, %three), direction=LT
}

%body_of_outer (p.6: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.6 = (s32[], f32[4]) parameter(0)
  %inner = (s32[], f32[4]) while(%p.6), condition=%cond_of_inner, body=%body_of_inner
  %unknown = (s32[], s32[]) while(%p.6), condition=%cond_of_unknown, body=%body_of_unknown
  ROOT %t.6 = (s32[], f32[4]) tuple(%inner, %unknown)
}

ENTRY %main (a: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = (s32[], f32[4]) parameter(0)
  %outer = (s32[], f32[4]) while(%a), condition=%cond_of_outer, body=%body_of_outer
  ROOT %again = (s32[], f32[4]) while(%outer), condition=%cond_of_inner, body=%body_of_inner
}
"""


def test_loops_count_by_the_constant_they_stop_at_and_loops_of_unknown_length_once():
    executions = Program(LOOPS).executions
    assert executions["body_of_outer"] == 3
    assert executions["body_of_inner"] == 3 * 5 + 5
    assert executions["body_of_unknown"] == 3


def test_instructions_have_their_types_operands_and_users():
    program = Program(LOOPS)
    compare = program.computations["cond_of_inner"][-1]
    assert (compare.name, compare.opcode, compare.operands) == ("lt.1", "compare", ("i.1", "five"))
    assert program.types["cond_of_inner", "p.1"] == "(s32[]{:T(128)}, f32[4]{0:T(128)})"
    assert [user.name for user in program.users["body_of_outer", "p.6"]] == ["inner", "unknown"]


@pytest.mark.parametrize(
    ("shapes", "size", "slow"),
    [
        ("f32[2,3]{1,0}", 24, 24),
        ("(bf16[8]{0:T(1024)(128)(2,1)}, pred[3]{0}, s8[])", 16 + 3 + 1, 20),
        ("bf16[16,128]{1,0:T(8,128)(2,1)S(1)}", 4096, 0),
        ("(f32[4]{0:T(128)}, f32[4]{0:T(128)S(1)}, u32[]{:S(2)})", 36, 16),
        ("f8e4m3fn[10]", 10, 10),
        ("token[]", 0, 0),
    ],
)
def test_bytes_of_a_type_all_of_them_and_those_in_main_memory(shapes, size, slow):
    assert bytes_of(shapes) == size
    assert slow_bytes_of(shapes) == slow


def test_a_program_compiled_here_counts_the_bodies_of_its_scans():
    def nested(x):
        def outer(carry, _):
            return jax.lax.fori_loop(0, 7, lambda _, y: jnp.sin(y) @ y, carry), None

        return jax.lax.scan(outer, x, None, length=11)[0]

    program = Program(jax.jit(nested).lower(jnp.ones((64, 64))).compile().as_text())
    products = [each for each in program if each.opcode == "dot"]
    assert [program.executions[each.computation] for each in products] == [77]
