"""Memory traffic of programs written by hand, against bytes counted by hand."""

from dsv3_jax.plan.hlo import Program
from dsv3_jax.plan.traffic import memory_traffic

KIB = 1024

# A layer's weights, 256 x 256 float32, are taken out of a stack of 10, converted and multiplied with 8 rows in fast
# memory; the result replaces one of the 10 layers of a stack of results.
SCAN = """HloModule jit_scan

%taken (p0.1: f32[10,256,256], p1.1: s32[]) -> bf16[256,256] {
  %p0.1 = f32[10,256,256]{2,1,0:T(8,128)} parameter(0)
  %p1.1 = s32[]{:T(128)} parameter(1)
  %all.1 = bf16[10,256,256]{2,1,0:T(8,128)(2,1)} convert(%p0.1)
  %part.1 = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%all.1, %p1.1), dynamic_slice_sizes={1,256,256}
  ROOT %b.1 = bf16[256,256]{1,0:T(8,128)(2,1)} bitcast(%part.1)
}

%multiplied (p0.2: f32[10,256,256], p1.2: bf16[8,256], p2.2: s32[]) -> bf16[8,256] {
  %p0.2 = f32[10,256,256]{2,1,0:T(8,128)} parameter(0)
  %p1.2 = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %p2.2 = s32[]{:T(128)} parameter(2)
  %inside.2 = bf16[256,256]{1,0:T(8,128)(2,1)} fusion(%p0.2, %p2.2), kind=kLoop, calls=%taken
  ROOT %c.2 = bf16[8,256]{1,0:T(8,128)(2,1)} convolution(%p1.2, %inside.2), dim_labels=bf_io->bf
}

%replaced (p0.3: bf16[10,8,256], p1.3: bf16[8,256], p2.3: s32[]) -> bf16[10,8,256] {
  %p0.3 = bf16[10,8,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1.3 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(1)
  %p2.3 = s32[]{:T(128)} parameter(2)
  %one.3 = bf16[1,8,256]{2,1,0:T(8,128)(2,1)} bitcast(%p1.3)
  ROOT %u.3 = bf16[10,8,256]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p0.3, %one.3, %p2.3)
}

%body (p.4: (s32[], f32[10,256,256], bf16[8,256], bf16[10,8,256])) -> (s32[], f32[10,256,256], bf16[8,256], bf16[10,8,256]) {
  %p.4 = (s32[], f32[10,256,256], bf16[8,256], bf16[10,8,256]) parameter(0)
  %i.4 = s32[]{:T(128)S(6)} get-tuple-element(%p.4), index=0
  %w.4 = f32[10,256,256]{2,1,0:T(8,128)} get-tuple-element(%p.4), index=1
  %x.4 = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.4), index=2
  %y.4 = bf16[10,8,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p.4), index=3
  %m.4 = bf16[8,256]{1,0:T(8,128)(2,1)} fusion(%w.4, %x.4, %i.4), kind=kOutput, calls=%multiplied
  %r.4 = bf16[10,8,256]{2,1,0:T(8,128)(2,1)} fusion(%y.4, %m.4, %i.4), kind=kLoop, calls=%replaced
  ROOT %t.4 = (s32[], f32[10,256,256], bf16[8,256], bf16[10,8,256]) tuple(%i.4, %w.4, %x.4, %r.4)
}

%cond (p.5: (s32[], f32[10,256,256], bf16[8,256], bf16[10,8,256])) -> pred[] {
  %p.5 = (s32[], f32[10,256,256], bf16[8,256], bf16[10,8,256]) parameter(0)
  %i.5 = s32[]{:T(128)S(6)} get-tuple-element(%p.5), index=0
  %n.5 = s32[]{:T(128)S(6)} constant(10)
  ROOT %lt.5 = pred[]{:T(512)S(6)} compare(%i.5, %n.5), direction=LT
}

ENTRY %main (a: f32[10,256,256], b: bf16[8,256]) -> (s32[], f32[10,256,256], bf16[8,256], bf16[10,8,256]) {
  %a = f32[10,256,256]{2,1,0:T(8,128)} parameter(0)
  %b = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %start = (bf16[8,256]{1,0:T(8,128)(2,1)S(1)}, bf16[8,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%b)
  %fast = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %nothing = bf16[]{:T(256)S(6)} constant(0)
  %y = bf16[10,8,256]{2,1,0:T(8,128)(2,1)} broadcast(%nothing), dimensions={}
  %t = (s32[], f32[10,256,256], bf16[8,256], bf16[10,8,256]) tuple(%zero, %a, %fast, %y)
  ROOT %w = (s32[], f32[10,256,256], bf16[8,256], bf16[10,8,256]) while(%t), condition=%cond, body=%body
}
"""  # fmt: skip  # noqa: E501


def test_a_scan_reads_a_layer_and_writes_a_layer_every_time_not_its_stacks():
    rows = 4 * KIB
    layer_read = 2 * 256 * 256  # what the slice gives, in its own type
    each_time = layer_read + rows + rows + rows  # the product's result written, read again, and put in its place
    before = rows + 10 * rows  # b copied to fast memory; the stack of results zeroed
    assert memory_traffic(Program(SCAN)) == 10 * each_time + before


# A token's entry of each of 16 rows written into a cache, in place.
SCATTER = """HloModule jit_scatter

%last (a.1: bf16[], b.1: bf16[]) -> bf16[] {
  %a.1 = bf16[]{:T(256)} parameter(0)
  ROOT %b.1 = bf16[]{:T(256)} parameter(1)
}

%written (p0.2: bf16[16,4096,512], p1.2: s32[16,2], p2.2: bf16[16,512]) -> bf16[16,4096,512] {
  %p0.2 = bf16[16,4096,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1.2 = s32[16,2]{1,0:T(8,128)} parameter(1)
  %p2.2 = bf16[16,512]{1,0:T(8,128)(2,1)} parameter(2)
  ROOT %s.2 = bf16[16,4096,512]{2,1,0:T(8,128)(2,1)} scatter(%p0.2, %p1.2, %p2.2), to_apply=%last
}

ENTRY %main (cache: bf16[16,4096,512], at: s32[16,2], new: bf16[16,512]) -> bf16[16,4096,512] {
  %cache = bf16[16,4096,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %at = s32[16,2]{1,0:T(8,128)} parameter(1)
  %new = bf16[16,512]{1,0:T(8,128)(2,1)} parameter(2)
  ROOT %f = bf16[16,4096,512]{2,1,0:T(8,128)(2,1)} fusion(%cache, %at, %new), kind=kCustom, calls=%written
}
"""  # fmt: skip


def test_what_is_written_into_a_cache_is_all_that_moves():
    assert memory_traffic(Program(SCATTER)) == 2 * 16 * KIB + 16 * 2 * 4
