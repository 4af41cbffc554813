"""Costs against counts by hand: of programs compiled here, and of lines as XLA prints them for TPUs and GPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost.models.attention import attention
from jaxpost.models.views import Places
from jaxpost.planning.hlo import Collective, program_cost, shapes

L, B, D = 4, 64, 32
WIDTH = 4  # bytes of a float32
PRODUCT = 2 * B * D * D  # FLOPs of [B, D] @ [D, D]


def array(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def module(entry, computations="", devices=8):
    """A module around the lines of its entry computation."""
    return (
        f"HloModule test, num_partitions={devices}\n\n{computations}\nENTRY %main (p: f32[]) -> f32[] {{\n{entry}\n}}\n"
    )


def run_layers(weights, x):
    return lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]


def test_matrix_product():
    cost = program_cost(compiled(jnp.matmul, array(B, D), array(D, 16)))
    assert cost == (2 * B * D * 16, WIDTH * (B * D + D * 16 + B * 16), [], {})


@pytest.mark.parametrize("remat, products", [(False, 3), (True, 4)])
def test_gradient_through_layers(remat, products):
    def loss(weights, x):
        def layer(x, weight):
            return jnp.tanh(x @ weight), None

        return jnp.sum(lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0] ** 2)

    text = compiled(jax.grad(loss), array(L, D, D), array(B, D))
    assert program_cost(text).flops == L * products * PRODUCT


def test_stacked_weights_are_read_once():
    weights = 16 * 256 * 256 * WIDTH
    cost = program_cost(compiled(run_layers, array(16, 256, 256), array(1, 256)))
    assert weights < cost.bytes < 3.2 * weights  # XLA on CPU copies each layer's slice: read, written and read


def test_stacked_results_are_written_once():
    def states(x):
        return lax.scan(lambda x, _: (x * 2, x), x, None, length=32)[1]

    stack = 32 * 64 * 64 * WIDTH
    assert program_cost(compiled(states, array(64, 64))).bytes < 8 * stack  # once for each trip would be 32


def test_gathers_and_scatters_move_rows():
    table, rows = array(1000, 64), array(8, dtype=jnp.int32)
    row_bytes = 8 * 64 * WIDTH
    assert program_cost(compiled(lambda table, rows: table[rows], table, rows)).bytes < 4 * row_bytes
    put = compiled(lambda table, rows: table.at[rows].add(1.0), table, rows, donate_argnums=0)
    assert program_cost(put).bytes < 10 * row_bytes


def windows(h, weight, count):
    """As many windows of `h` as is only known at run time, each times the weight."""

    def body(index, out):
        part = lax.dynamic_slice_in_dim(h, index * 16, 16)
        return lax.dynamic_update_slice_in_dim(out, part @ weight, index * 16, 0)

    return lax.fori_loop(0, count, body, jnp.zeros((len(h), weight.shape[1])))


def test_open_loop_is_bounded_by_its_windows():
    text = compiled(windows, array(B, D), array(D, D), array(dtype=jnp.int32))
    assert program_cost(text).flops == PRODUCT
    heard = []
    half = program_cost(text, trips=lambda op_name, bound: heard.append((op_name, bound)) or bound / 2)
    assert half.flops == PRODUCT / 2
    assert heard == [("jit(windows)/while", B // 16)]


def test_open_loop_in_counted_loop():
    def stack(h, weights, count):
        return lax.scan(lambda h, weight: (windows(h, weight, count), None), h, weights)[0]

    text = compiled(stack, array(B, D), array(L, D, D), array(dtype=jnp.int32))
    assert program_cost(text).flops == L * PRODUCT


def test_loop_that_may_end_early_counts_in_full():
    def search(x, weight):
        def body(state):
            return state[0] + 1, jnp.tanh(state[1] @ weight)

        return lax.while_loop(lambda state: (state[0] < 7) & (state[1][0, 0] < 3), body, (0, x))

    assert program_cost(compiled(search, array(B, D), array(D, D))).flops == 7 * PRODUCT


def test_tiled_attention_counts_every_tile():
    """Its inner loop's bound is data, and it looks the tiles up in a [tiles, tiles] table: one row, not all, a trip."""
    length, heads, dim = 1024, 2, 16
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    rows = array(1, length, heads, dim)

    def loss(query, key, value, positions, segments):
        return jnp.sum(attention(query, key, value, Places(positions, segments), scale=1.0, kernel="xla"))

    text = compiled(jax.grad(loss, (0, 1, 2)), rows, rows, rows, tokens, tokens)
    # Forward: the scores for their peak, the scores again, the values; backward: five products.
    assert program_cost(text).flops == (3 + 5) * 2 * heads * length * length * dim


def test_conditional_counts_its_most_expensive_branch():
    def branch(flag, x):
        return lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert program_cost(compiled(branch, array(dtype=jnp.bool_), array(D, D))).flops == 2 * 2 * D**3


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))


def test_sharded_weight_is_gathered(mesh):
    rows = NamedSharding(mesh, P("fsdp"))
    h, weight = (jax.ShapeDtypeStruct(dims, jnp.float32, sharding=rows) for dims in ((64, 128), (128, 256)))
    text = compiled(jnp.matmul, h, weight, out_shardings=rows)
    received = 7 / 8 * 128 * 256 * WIDTH
    assert program_cost(text).collectives == {"all-gather": Collective(1, received)}
    assert program_cost(text).flops == 2 * 64 * 128 * 256 / 8
    (gather,) = program_cost(text).transfers
    # Newer versions of JAX name the argument that is gathered, older ones what it is for.
    assert gather.op_name == ("b" if jax.__version_info__ >= (0, 11) else "jit(matmul)/dot_general")
    assert gather == ("all-gather", "f32", (128, 256), received, 1, gather.op_name, 8)
    assert {("f32", (128, 256)), ("f32", (8, 256))} <= shapes(text)
    assert ("f32", (64, 256)) not in shapes(text)


@pytest.mark.parametrize(
    "kind, function, received",
    [
        ("all-reduce", lambda x: lax.psum(x, "fsdp"), 2 * 7 / 8),
        ("reduce-scatter", lambda x: lax.psum_scatter(x, "fsdp", tiled=True), 7 / 8),
        ("all-to-all", lambda x: lax.all_to_all(x, "fsdp", 0, 0, tiled=True), 7 / 8),
        ("collective-permute", lambda x: lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)]), 1),
        ("all-gather", lambda x: lax.all_gather(x, "fsdp"), 7),
    ],
)
def test_collectives(mesh, kind, function, received):
    shared = jax.shard_map(function, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
    text = compiled(shared, array(512, 32))
    assert program_cost(text).collectives == {kind: Collective(1, received * 64 * 32 * WIDTH)}


def test_collectives_of_loops_are_multiplied(mesh):
    def sums(x):
        return lax.fori_loop(0, 5, lambda _, x: lax.psum(jnp.sin(x), "fsdp"), x)

    shared = jax.shard_map(sums, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    text = compiled(shared, array(64, 32))
    assert program_cost(text).collectives["all-reduce"] == (5, 5 * 2 * 7 / 8 * 64 * 32 * WIDTH)
    assert [transfer.times for transfer in program_cost(text).transfers] == [5]


TPU_BATCHED_PRODUCT = """\
  %a = bf16[16,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,512,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[16,256,128]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, \
dim_labels=0bf_0io->0bf"""

PADDED_CONVOLUTION = """\
  %a = f32[2,10,3]{2,1,0} parameter(0)
  %b = f32[3,3,8]{2,1,0} parameter(1)
  ROOT %c = f32[2,10,8]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"""

RAGGED_PRODUCT = """\
  %a = f32[64,32]{1,0} parameter(0)
  %b = f32[8,32,16]{2,1,0} parameter(1)
  %n = s32[8]{0} parameter(2)
  ROOT %c = f32[64,16]{1,0} ragged-dot(%a, %b, %n), lhs_contracting_dims={1}, rhs_contracting_dims={1}, \
lhs_ragged_dims={0}, rhs_group_dims={0}"""

RAGGED_GRADIENT = """\
  %a = f32[64,32]{1,0} parameter(0)
  %b = f32[64,16]{1,0} parameter(1)
  %n = s32[8]{0} parameter(2)
  ROOT %c = f32[8,32,16]{2,1,0} ragged-dot(%a, %b, %n), lhs_contracting_dims={0}, rhs_contracting_dims={0}, \
lhs_ragged_dims={0}"""

CUBLAS = """\
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %c = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}
  ROOT %d = bf16[64,16]{1,0} get-tuple-element(%c), index=0"""

CUDNN = """\
  %q = bf16[2,128,4,64]{3,2,1,0} parameter(0)
  ROOT %o = (bf16[2,4,128,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", \
backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16",\
"dimensions":["2","4","128","128"],"layout":{"minor_to_major":["3"]}}}}"""

ESTIMATE = """\
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %c = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"TUzvUg","cost_estimate":{"flops":"4096","bytes_accessed":"9"}}}"""

SPLASH = """\
  %mask = s8[1,2,2]{2,1,0:T(8,128)(4,1)} parameter(0)
  %q = bf16[8,256,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %k = bf16[8,256,64]{2,1,0:T(8,128)(2,1)} parameter(2)
  ROOT %dq = bf16[8,256,64]{2,1,0:T(8,128)(2,1)} custom-call(%mask, %q, %k, %k), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/splash_mha_dq_no_residuals/pallas_call"}"""


FLASH = """\
  %q = bf16[1,8,4,256,64]{4,3,2,1,0} parameter(0)
  %k = bf16[1,8,256,64]{3,2,1,0} parameter(1)
  %l = s32[1,4,5]{2,1,0} parameter(2)
  ROOT %o = (bf16[1,8,4,256,64]{4,3,2,1,0}, f32[1,8,4,256]{3,2,1,0}) custom-call(%q, %k, %k, %l), \
custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/shard_map/flash_fwd/pallas_call"}"""


GROUPED = """\
  %n = s32[12,3]{1,0} parameter(0)
  %x = bf16[256,64]{1,0} parameter(1)
  %w = bf16[8,64,32]{2,1,0} parameter(2)
  ROOT %o = bf16[256,32]{1,0} custom-call(%n, %x, %w), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/grouped_rows/pallas_call"}"""


@pytest.mark.parametrize(
    "entry, flops",
    [
        (TPU_BATCHED_PRODUCT, 2 * 16 * 256 * 512 * 128),
        (PADDED_CONVOLUTION, 2 * 2 * 28 * 3 * 8),  # at either end one place of the kernel meets padding
        (RAGGED_PRODUCT, 2 * 64 * 32 * 16),
        (RAGGED_GRADIENT, 2 * 64 * 32 * 16),
        (CUBLAS, 2 * 64 * 32 * 16),
        (CUDNN, 2 * 2 * (2 * 4 * 128 * 128) * 64),
        (ESTIMATE, 4096),
        (SPLASH, 3 * 2 * 8 * 256 * 256 * 64),
        (GROUPED, 2 * 256 * 64 * 32),
        (FLASH, 5 / 8 * 2 * 2 * 32 * 256 * 256 * 64),  # ten of sixteen tiles
    ],
)
def test_products_and_kernels(entry, flops):
    cost = program_cost(module(entry))
    assert cost.flops == flops
    assert not cost.opaque


def test_kernel_that_does_not_tell():
    text = module(ESTIMATE.replace('"cost_estimate"', '"other"') + ', metadata={op_name="jit(f)/mine"}')
    assert program_cost(text).opaque == {"jit(f)/mine": 1}


TRITON = """\
%gemm (x: bf16[64,32], y: bf16[32,16]) -> bf16[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %y = bf16[32,16]{1,0} parameter(1)
  ROOT %dot = bf16[64,16]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_triton_product_and_asynchronous_collectives():
    entry = """\
  %p = bf16[64,32]{1,0} parameter(0)
  %w = bf16[4,16]{1,0} parameter(1)
  %start = (bf16[4,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%w), replica_groups=[1,8]<=[8], dimensions={0}
  %done = bf16[32,16]{1,0} all-gather-done(%start)
  %product = bf16[64,16]{1,0} fusion(%p, %done), kind=kCustom, calls=%gemm
  %begin = ((bf16[64,16]{1,0}), (bf16[8,16]{1,0})) reduce-scatter-start(%product), replica_groups=[1,8]<=[8], \
to_apply=%add
  ROOT %end = bf16[8,16]{1,0} reduce-scatter-done(%begin)"""
    cost = program_cost(module(entry, TRITON))
    weight, out = 2 * 32 * 16, 2 * 64 * 16
    assert cost.flops == 2 * 64 * 32 * 16
    assert cost.bytes == (1 / 8 + 1) * weight + (2 * 64 * 32 + weight + out) + (1 + 1 / 8) * out
    assert cost.collectives == {
        "all-gather": Collective(1, 7 / 8 * weight),
        "reduce-scatter": Collective(1, 7 / 8 * out),
    }


def test_wrapped_asynchronous_computation_counts_once():
    entry = """\
  %p = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} parameter(1)
  %start = ((bf16[64,32]{1,0}, bf16[32,16]{1,0}), bf16[64,16]{1,0}, u32[]) async-start(%p, %w), calls=%gemm
  %update = ((bf16[64,32]{1,0}, bf16[32,16]{1,0}), bf16[64,16]{1,0}, u32[]) async-update(%start)
  ROOT %done = bf16[64,16]{1,0} async-done(%update)"""
    assert program_cost(module(entry, TRITON)).flops == 2 * 64 * 32 * 16


def test_collective_spread_over_fusions_counts_once():
    """TPUs gather while they multiply: what starts, continues and ends a collective is a fusion that shows it whole."""
    gather = (
        "all-gather(%p), channel_id=13, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, "
        'metadata={op_name="jit(f)/dot"}'
    )
    near, far = "bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", "bf16[64,128]{1,0:T(8,128)(2,1)}"
    fusions = f"""\
%first (p: bf16[8,128]) -> (bf16[8,128], bf16[64,128]) {{
  %p = {near} parameter(0)
  %g = {far} {gather}
  ROOT %start = ({near}, {far}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%last (p: bf16[8,128], q: bf16[64,128]) -> bf16[64,128] {{
  %p = {near} parameter(0)
  %q = {far} parameter(1)
  %g = {far} {gather}
  ROOT %end = {far} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}}
"""
    entry = f"""\
  %x = {near} parameter(0)
  %a = ({near}, {far}) fusion(%x), kind=kCustom, calls=%first
  %b = {near} get-tuple-element(%a), index=0
  %c = {far} get-tuple-element(%a), index=1
  ROOT %d = {far} fusion(%b, %c), kind=kCustom, calls=%last"""
    text = module(entry, fusions)
    whole = 2 * 64 * 128
    assert program_cost(text).transfers == [("all-gather", "bf16", (64, 128), 7 / 8 * whole, 1, "jit(f)/dot", 8)]
    assert program_cost(text).bytes == whole  # written once; the shard lies on the chip


def test_prefetch_reads_once():
    entry = """\
  %p = f32[1024]{0:T(1024)} parameter(0)
  %start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%p)
  %done = f32[1024]{0:T(1024)S(1)} copy-done(%start)
  ROOT %r = f32[1024]{0:T(1024)} negate(%done)"""
    assert program_cost(module(entry)).bytes == 2 * 4096


COUNTED = """\
%body (s: (s32[], s32[], f32[8,8])) -> (s32[], s32[], f32[8,8]) {
  %s = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %n = s32[]{:T(128)} get-tuple-element(%s), index=1
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%s), index=2
  %y = f32[8,8]{1,0:T(8,128)} convolution(%x, %x), dim_labels=bf_io->bf
  ROOT %t = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) tuple(%next, %n, %y)
}

%condition (s: (s32[], s32[], f32[8,8])) -> pred[] {
  %s = (s32[]{:T(128)}, s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %n = s32[]{:T(128)} get-tuple-element(%s), index=1
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=DIRECTION
}
"""


@pytest.mark.parametrize(
    "direction, limit, trips", [("LT", 7, 4), ("LT", 8, 4), ("LE", 8, 5), ("NE", 8, 4), ("LT", 0, 0)]
)
def test_trips_that_are_not_written_down(direction, limit, trips):
    entry = f"""\
  %x = f32[8,8]{{1,0:T(8,128)}} parameter(0)
  %zero = s32[]{{:T(128)}} constant(0)
  %copy = s32[]{{:T(128)}} copy(%zero)
  %limit = s32[]{{:T(128)}} constant({limit})
  %t = (s32[], s32[], f32[8,8]{{1,0:T(8,128)}}) tuple(%copy, %limit, %x)
  ROOT %w = (s32[], s32[], f32[8,8]{{1,0:T(8,128)}}) while(%t), condition=%condition, body=%body"""
    text = module(entry, COUNTED.replace("DIRECTION", direction))
    assert program_cost(text).flops == trips * 2 * 8**3


def test_long_chains_of_instructions():
    lines = [f"  %x{i} = f32[8]{{0}} add(%x{i - 1}, %x{i - 1})" for i in range(1, 20_000)]
    text = module("\n".join(["  %x0 = f32[8]{0} parameter(0)", *lines, "  ROOT %r = f32[8]{0} negate(%x19999)"]))
    assert program_cost(text).bytes == 20_000 * 2 * 32
