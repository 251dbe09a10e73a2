"""What compiled programs send, from recorded texts of XLA:TPU and XLA:GPU, shortened."""

from __future__ import annotations

import pytest

from moe_jax.profiling.transfers import first_group, group_axes, sent_share, transfers
from tests.profiling.test_flops import GPU_TEXT

SHAPE = {"data": 2, "expert": 4, "tensor": 1}
FUSED = (
    'backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}, '
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}, channel_id=8, dimensions={0}"
)
# libtpu 0.0.41: a scan of 3 layers without a written trip count; a gather of 512 bytes beside two
# fusions, a kernel whose attributes take three lines, an all-reduce of which each device keeps its
# part, exchanges of both kinds.
TPU_TEXT = f"""HloModule jit_step, is_scheduled=true, num_partitions=8

%starts (p: bf16[4,32]) -> (bf16[4,32], bf16[8,32]) {{
  %p = bf16[4,32]{{1,0:T(8,128)(2,1)}} parameter(0)
  %all-gather.1 = bf16[8,32]{{1,0:T(8,128)(2,1)}} all-gather(%p), {FUSED}
  ROOT %c = (bf16[4,32], bf16[8,32]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.2 (p: bf16[4,32]) -> (bf16[4,32], bf16[8,32]) {{
  %p = bf16[4,32]{{1,0}} parameter(0)
  %all-gather.2 = bf16[8,32]{{1,0}} all-gather(%p), {FUSED}
  ROOT %c = (bf16[4,32], bf16[8,32]) custom-call(%all-gather.2), custom_call_target="Step"
}}

%all-reduce-scatter.3 (p: f32[8,4]) -> f32[2,4] {{
  %p = f32[8,4]{{1,0}} parameter(0)
  %all-reduce.4 = f32[8,4]{{1,0}} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %mine = f32[2,4]{{1,0}} dynamic-slice(%all-reduce.4, %index), dynamic_slice_sizes={{2,4}}
}}

%condition (s: (s32[], bf16[4,32])) -> pred[] {{
  %s = (s32[], bf16[4,32]) parameter(0)
  %limit = s32[]{{:T(128)}} constant(3)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}

%body (s: (s32[], bf16[4,32])) -> (s32[], bf16[4,32]) {{
  %s = (s32[], bf16[4,32]) parameter(0)
  %x = bf16[4,32]{{1,0}} get-tuple-element(%s), index=1
  %start = (bf16[4,32], bf16[8,32]) fusion(%x), kind=kCustom, calls=%starts
  %step = (bf16[4,32], bf16[8,32]) fusion(%x), kind=kOutput, calls=%async_collective_fusion.2
  %kernel = bf16[4,32]{{1,0}} custom-call(%x), frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": 512}}"
}}}}, metadata={{op_name="kernel"}}
  %alone = bf16[4,64]{{1,0}} all-to-all(%x), \
replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, dimensions={{0}}
  %begun = ((bf16[4,64]), bf16[4,64], u32[]) all-to-all-start(%x), \
replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, dimensions={{0}}
  %product = f32[4,4]{{1,0}} fusion(%x), kind=kLoop, calls=%nothing
  %ended = bf16[4,64]{{1,0}} all-to-all-done(%begun)
  %idle = (bf16[4,8], bf16[4,8]) collective-permute-start(%x), \
source_target_pairs={{{{0,0}},{{1,5}},{{5,1}}}}
  %moved = bf16[4,8]{{1,0}} collective-permute-done(%idle)
  %sum = f32[2,4]{{1,0}} fusion(%grads), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %t = (s32[], bf16[4,32]) tuple(%i, %x)
}}

%nothing (p: bf16[4,32]) -> f32[4,4] {{
  ROOT %p = bf16[4,32]{{1,0}} parameter(0)
}}

ENTRY %main (a: bf16[4,32]) -> bf16[4,32] {{
  %a = bf16[4,32]{{1,0}} parameter(0)
  %looped = (s32[], bf16[4,32]) while(%t), condition=%condition, body=%body
  %norm = f32[] all-reduce(%c), replica_groups={{}}, to_apply=%add
  ROOT %out = bf16[4,32]{{1,0}} get-tuple-element(%looped), index=1
}}
"""


def test_collectives_of_a_tpu_program():
    found = [
        (one.kind, group_axes(one.members, SHAPE), one.times, one.bytes, one.sent, one.hidden)
        for one in transfers(TPU_TEXT)
    ]
    assert found == [
        ("all-gather", ("data",), 3, 3 * 512, 3 * 256, True),
        ("all-to-all", ("expert",), 3, 3 * 512, 3 * 384, False),
        ("all-to-all", ("expert",), 3, 3 * 512, 3 * 384, True),
        ("collective-permute", ("data",), 3, 3 * 64, 3 * 64, False),
        ("reduce-scatter", ("expert",), 3, 3 * 128, 3 * 96, False),
        ("all-reduce", ("data", "expert"), 1, 4, 7, False),
    ]


def test_collectives_of_a_gpu_program():
    found = [(one.kind, one.members, one.bytes, one.hidden) for one in transfers(GPU_TEXT)]
    assert found == [
        ("all-gather", (0, 1, 2, 3), 64 * 8 * 2, False),
        ("reduce-scatter", tuple(range(8)), 64 * 8 * 2, False),
        ("all-reduce", (0, 1), 8, False),
    ]


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups={{0,4},{1,5}}", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['data'=2,'expert'=4] {'data'}", (0, 4)),
        ("source_target_pairs={{0,0},{3,7}}", (3, 7)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_in_all_notations(groups, members):
    assert first_group(f"channel_id=1, {groups}, dimensions={{0}}", 8) == members


def test_what_leaves_a_device_at_least():
    assert sent_share("all-gather", 4) == 0.75
    assert sent_share("all-reduce", 4) == 1.5
    assert sent_share("collective-permute", 2) == 1
