"""The Triton kernel that computes sparse and dense regions in one launch.

At decode sizes a GEMM takes as long as its weights take to arrive from memory. So the kernel reads a 2:4 tile
compressed, expands it in registers and feeds ordinary dense FP8 tensor cores; they have time to spare.

A program owns one block of output rows and a run of tiles of one region, a *part*. Where several programs share a
block, each leaves its FP32 sums in a slot, and the last to arrive adds all slots in a fixed order: the result does
not depend on which program was last.
"""

# Triton reads these functions itself, and annotations mean something else to it.
# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from vllm_spense.kernels.one_launch_pack import GROUPS, HALF, PLANES, ROWS, SPARSE_COLUMNS

_ROWS = tl.constexpr(ROWS)
_HALF = tl.constexpr(HALF)
_GROUPS = tl.constexpr(GROUPS)
_COLUMNS = tl.constexpr(SPARSE_COLUMNS)
_PLANE = tl.constexpr(ROWS * GROUPS)
_SPARSE_TILE = tl.constexpr(PLANES * ROWS * GROUPS)
_DENSE_TILE = tl.constexpr(ROWS * HALF)


def _expansion_ptx() -> str:
    """PTX that expands four groups of both halves at once, one group a byte of each register.

    $8 to $11 hold first and second kept values of halves a and b, $12 the keep masks; $0 to $7 receive columns 0 to 3
    of half a, then of half b.
    """
    lines = [".reg .b32 keep0, keep1, keep2, keep3, value;"]
    for half, (first, second) in enumerate((("$8", "$9"), ("$10", "$11"))):
        out = [f"${4 * half + place}" for place in range(4)]
        for place in range(4):
            # Brings the mask bit to the byte's sign; prmt's 8s then spread each byte's sign over the byte.
            lines += [f"shl.b32 value, $12, {4 * half + place};", f"prmt.b32 keep{place}, value, 0, 0xba98;"]
        # 0xca selects: the first operand's ones take the second operand, its zeros the third.
        lines += [
            f"and.b32 {out[0]}, {first}, keep0;",
            f"lop3.b32 value, keep0, {second}, {first}, 0xca;",
            f"and.b32 {out[1]}, value, keep1;",
            f"lop3.b32 value, keep3, {first}, {second}, 0xca;",
            f"and.b32 {out[2]}, value, keep2;",
            f"and.b32 {out[3]}, {second}, keep3;",
        ]
    return "\n".join(("{", *lines, "}"))


_EXPANSION = tl.constexpr(_expansion_ptx())
_OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 5))


@triton.jit
def _expand_half(first, second, keep):
    """The four columns of every group, in portable arithmetic: what the PTX does."""
    zero = tl.zeros_like(first)
    keep0 = (keep & 8) != 0
    keep3 = (keep & 1) != 0
    column0 = tl.where(keep0, first, zero)
    column1 = tl.where((keep & 4) != 0, tl.where(keep0, second, first), zero)
    column2 = tl.where((keep & 2) != 0, tl.where(keep3, first, second), zero)
    column3 = tl.where(keep3, second, zero)
    return column0, column1, column2, column3


@triton.jit
def _expand(first_a, second_a, first_b, second_b, keep, PTX: tl.constexpr):
    """Planes of a sparse tile (rows, 32) → the tile (rows, 256), columns in kernel order."""
    if PTX:
        a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
            _EXPANSION,
            _OPERANDS,
            [first_a, second_a, first_b, second_b, keep],
            dtype=(tl.uint8, tl.uint8, tl.uint8, tl.uint8, tl.uint8, tl.uint8, tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
    else:
        a0, a1, a2, a3 = _expand_half(first_a, second_a, keep >> 4)
        b0, b1, b2, b3 = _expand_half(first_b, second_b, keep & 15)
    # Each join adds a last dimension of two, so the dimensions end up as group, place (2 bits), half in reverse.
    a = tl.join(tl.join(a0, a1), tl.join(a2, a3))
    b = tl.join(tl.join(b0, b1), tl.join(b2, b3))
    tile = tl.permute(tl.join(a, b), (0, 4, 3, 2, 1))
    return tl.reshape(tile, (first_a.shape[0], _COLUMNS)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _sum_sparse(sums, x, weights, tiles, begin, end, token, has_token, x_stride, ROW_BLOCK: tl.constexpr,
                STAGES: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Adds to `sums` (rows, tokens) the product with sparse tiles [begin, end); x points at the region's column 0."""
    row = tl.arange(0, ROW_BLOCK)
    offsets = (row // _ROWS * (tiles * _SPARSE_TILE) + row % _ROWS * _GROUPS)[:, None] + tl.arange(0, _GROUPS)[None, :]
    x_offsets = token[:, None] * x_stride + tl.arange(0, _COLUMNS)[None, :]
    weights += begin * _SPARSE_TILE
    x += begin * _COLUMNS
    for _ in tl.range(begin, end, num_stages=STAGES):
        first_a = tl.load(weights + offsets)
        second_a = tl.load(weights + _PLANE + offsets)
        first_b = tl.load(weights + 2 * _PLANE + offsets)
        second_b = tl.load(weights + 3 * _PLANE + offsets)
        keep = tl.load(weights + 4 * _PLANE + offsets)
        activations = tl.load(x + x_offsets, mask=has_token[:, None], other=0.0)
        tile = _expand(first_a, second_a, first_b, second_b, keep, PTX)
        sums = tl.dot(tile, tl.trans(activations), sums)
        weights += _SPARSE_TILE
        x += _COLUMNS
    return sums


@triton.jit
def _sum_dense(sums, x, weights, tiles, begin, end, token, has_token, x_stride, ROW_BLOCK: tl.constexpr,
               COLUMNS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """As `_sum_sparse`, for steps [begin, end) of COLUMNS dense columns."""
    row = tl.arange(0, ROW_BLOCK)
    column = tl.arange(0, COLUMNS)
    row_offsets = row // _ROWS * (tiles * _DENSE_TILE) + row % _ROWS * _HALF
    offsets = row_offsets[:, None] + (column // _HALF * _DENSE_TILE + column % _HALF)[None, :]
    x_offsets = token[:, None] * x_stride + column[None, :]
    weights += begin * (COLUMNS * _ROWS)
    x += begin * COLUMNS
    for _ in tl.range(begin, end, num_stages=STAGES):
        tile = tl.load(weights + offsets).to(tl.float8e4nv, bitcast=True)
        activations = tl.load(x + x_offsets, mask=has_token[:, None], other=0.0)
        sums = tl.dot(tile, tl.trans(activations), sums)
        weights += COLUMNS * _ROWS
        x += COLUMNS
    return sums


@triton.jit(
    do_not_specialize=[
        "tokens", "sparse_tiles", "dense_tiles", "sparse_blocks", "dense_blocks", "sparse_parts", "dense_parts"
    ]
)  # fmt: skip
def gemm(
    x, sparse, dense, out, slots, arrivals,
    tokens, x_stride, out_stride, sparse_tiles, dense_tiles, sparse_blocks, dense_blocks, sparse_parts, dense_parts,
    SHARED: tl.constexpr, TOKEN_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, DENSE_COLUMNS: tl.constexpr,
    SPARSE_STAGES: tl.constexpr, DENSE_STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """out[m, n] = Σ_k x[m, k] · W[n, k]

    `tiles` and `blocks` count what each region has along K and along N, `parts` how many programs share one of its
    row blocks. Grid: (token blocks, dense_blocks · dense_parts + sparse_blocks · sparse_parts).

    SHARED (input-split): the regions split K, and both sum into the same row blocks. Otherwise (output-split) rows of
    the dense region follow those of the sparse one.
    """
    token_block = tl.program_id(0)
    program = tl.program_id(1)
    token = token_block * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    has_token = token < tokens
    sums = tl.zeros((ROW_BLOCK, TOKEN_BLOCK), dtype=tl.float32)
    # Dense parts take longest: they go first, so that short ones fill the end.
    dense_programs = dense_blocks * dense_parts
    if program < dense_programs:
        region_block = program // dense_parts
        part = program % dense_parts
        steps = dense_tiles * _HALF // DENSE_COLUMNS
        x_dense = x
        if SHARED:
            x_dense += sparse_tiles * _COLUMNS
        sums = _sum_dense(
            sums, x_dense, dense + region_block.to(tl.int64) * (ROW_BLOCK // _ROWS * dense_tiles * _DENSE_TILE),
            dense_tiles, steps * part // dense_parts, steps * (part + 1) // dense_parts,
            token, has_token, x_stride, ROW_BLOCK, DENSE_COLUMNS, DENSE_STAGES,
        )  # fmt: skip
        block = region_block if SHARED else region_block + sparse_blocks
        parts = sparse_parts + dense_parts if SHARED else dense_parts
        slot = part + sparse_parts if SHARED else part
    else:
        region_block = (program - dense_programs) // sparse_parts
        part = (program - dense_programs) % sparse_parts
        sums = _sum_sparse(
            sums, x, sparse + region_block.to(tl.int64) * (ROW_BLOCK // _ROWS * sparse_tiles * _SPARSE_TILE),
            sparse_tiles, sparse_tiles * part // sparse_parts, sparse_tiles * (part + 1) // sparse_parts,
            token, has_token, x_stride, ROW_BLOCK, SPARSE_STAGES, PTX,
        )  # fmt: skip
        block = region_block
        parts = sparse_parts + dense_parts if SHARED else sparse_parts
        slot = part

    row = tl.arange(0, ROW_BLOCK)
    out_pointers = out + token[None, :].to(tl.int64) * out_stride + (block * ROW_BLOCK + row)[:, None]
    if parts == 1:
        tl.store(out_pointers, sums.to(out.dtype.element_ty), mask=has_token[None, :])
    else:
        slot_size: tl.constexpr = ROW_BLOCK * TOKEN_BLOCK
        blocks = tl.maximum(sparse_blocks, dense_blocks) if SHARED else sparse_blocks + dense_blocks
        group = token_block * blocks + block
        first_slot = slots + group.to(tl.int64) * (sparse_parts + dense_parts) * slot_size
        first_slot += row[:, None] * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)[None, :]
        tl.store(first_slot + slot * slot_size, sums)
        # Every thread's sums must be in memory before one of them reports the arrival.
        tl.debug_barrier()
        if tl.atomic_add(arrivals + group, 1, sem="acq_rel", scope="gpu") == parts - 1:
            total = tl.zeros_like(sums)
            for other in tl.range(0, parts, loop_unroll_factor=4):
                # L1 is not coherent with what other programs wrote.
                total += tl.load(first_slot + other * slot_size, cache_modifier=".cg")
            tl.store(out_pointers, total.to(out.dtype.element_ty), mask=has_token[None, :])
            tl.store(arrivals + group, 0)
