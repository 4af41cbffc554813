"""The parts of XLA's syntax that only some of its backends print."""

import pytest

from jaxpost.planning.hlo_text import ArrayType, array_types, group_size, parse


def test_types():
    types = {
        "bf16[8,<=128]{1,0:T(8,128)(2,1)S(1)}": (ArrayType("bf16", (8, 128), on_chip=True), 2048),
        "s4[3]{0}": (ArrayType("s4", (3,)), 1.5),
        "pred[]": (ArrayType("pred", ()), 1),
        "token[]": (ArrayType("token", ()), 0),
        "f8e4m3fn[2]{0:S(1)}": (ArrayType("f8e4m3fn", (2,)), 2),  # on GPU, S(1) is memory for collectives
        "/*index=5*/u32[]{:S(2)}": (ArrayType("u32", (), on_chip=True), 4),
    }
    assert [(x, x.bytes) for x in array_types(f"({', '.join(types)})")] == list(types.values())


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", 2),
        ("{}", 8),
    ],
)
def test_replica_groups(groups, size):
    text = f"""\
HloModule test, num_partitions=8

ENTRY %main (p: f32[16]) -> f32[16] {{
  %p = f32[16]{{0}} parameter(0)
  ROOT %r = f32[16]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, use_global_device_ids=true
}}
"""
    module = parse(text)
    assert group_size(module.entry.root, module.devices) == size
