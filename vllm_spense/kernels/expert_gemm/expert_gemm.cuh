// What the kernel for experts and its callers in Python agree on: how an instance is specialized, its sizes, its
// arguments, its shared memory. instances.py repeats these facts, and tests/vllm_spense/kernels/test_nvrtc.py has the
// compiler compare them.
#pragma once
#include "expert_route.cuh"
#include "expert_tiles.cuh"
#include "ptx.cuh"

// An instance; these defaults let the file compile by itself:
// nvcc -arch=sm_90a -I../jit -I../one_launch -cubin expert_gemm.cu
#ifndef MAX_TOKENS
#define MAX_TOKENS 32  // of a tile
#define SPARSE_K 256   // columns of W in a sparse step
#define STAGES 6       // of the ring in shared memory
#define EXPERTS 128
#endif

static_assert(
    MAX_TOKENS == 8 || MAX_TOKENS == 16 || MAX_TOKENS == 32 || MAX_TOKENS == 64 || MAX_TOKENS == 128 ||
    MAX_TOKENS == 256);
static_assert(SPARSE_K == 128 || SPARSE_K == 256);

constexpr int WARPGROUP = 128;                       // threads
constexpr int CONSUMERS = 2;                         // warpgroups that multiply
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
// Half of a multiprocessor's registers, and not all of its shared memory: thread blocks of the launches before and after
// find room beside this one's. Wider tiles need all registers.
constexpr bool LEAN = MAX_TOKENS <= 64;
// Registers of a thread, given from the producer to the consumers.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = LEAN ? 96 : 232;
constexpr int MMA_ROWS = 64;                         // rows of W in a tensor core instruction
constexpr int ROWS = CONSUMERS * MMA_ROWS;           // rows of W in a tile
constexpr int DENSE_K = 128;                         // columns of W in a dense step: one swizzled row of bytes
constexpr int SPARSE_ROW_BYTES = SPARSE_K / 2;       // two values of four are kept
constexpr int METADATA_TILE_BYTES = 512;             // for 64 rows × 64 columns

// Instructions along K in a step.
constexpr int SPARSE_INSTRUCTIONS = SPARSE_K / 64, DENSE_INSTRUCTIONS = DENSE_K / 32;

// A stage of the ring: W, then metadata, then x in boxes of 128 columns × as many tokens as the tile has.
constexpr int W_BYTES = ROWS * (DENSE_K > SPARSE_ROW_BYTES ? DENSE_K : SPARSE_ROW_BYTES);
constexpr int METADATA_BYTES = CONSUMERS * SPARSE_INSTRUCTIONS * METADATA_TILE_BYTES;
constexpr int X_BOXES = SPARSE_K / 128;
constexpr int STAGE_BYTES = W_BYTES + METADATA_BYTES + X_BOXES * MAX_TOKENS * 128;

// What is copied into it for a tile `width` tokens wide.
DEVICE_CONSTEXPR int sparse_step_bytes(int width) {
    return ROWS * SPARSE_ROW_BYTES + METADATA_BYTES + X_BOXES * width * 128;
}
DEVICE_CONSTEXPR int dense_step_bytes(int width) { return ROWS * DENSE_K + width * 128; }

// Where each consumer warp turns 16 × 16 outputs around, several at once in wide tiles. Rows of 48 bytes meet different
// banks.
constexpr int STAGING_PITCH = 48, SQUARE_BYTES = 16 * STAGING_PITCH, SQUARES = MAX_TOKENS < 128 ? 1 : 2;
constexpr int WARP_STAGING_BYTES = SQUARES * SQUARE_BYTES, STAGING_BYTES = CONSUMERS * 4 * WARP_STAGING_BYTES;

// Shared memory, by address: the ring begins at a multiple of 1024, as the swizzle asks.
//
//     ring     STAGES × STAGE_BYTES
//     staging  STAGING_BYTES
//     full     STAGES × 8          barriers: the producer's copies into a stage have arrived
//     empty    STAGES × 8          barriers: all consumers have read a stage
//     offsets  (EXPERTS + 1) × 4   Order's tables
//     first    (EXPERTS + 1) × 4
constexpr int ALIGNMENT = 1024, MAX_BARRIER_BYTES = 256, TABLE_BYTES = (EXPERTS + 1) * 8;
constexpr int SHARED_BYTES = ALIGNMENT + STAGES * STAGE_BYTES + STAGING_BYTES + MAX_BARRIER_BYTES + TABLE_BYTES;
static_assert(16 * STAGES <= MAX_BARRIER_BYTES);
static_assert(SHARED_BYTES <= (LEAN ? 200 : 227) * 1024, "compute capability 9.0 has 227 KiB");

struct SharedMemory {
    u32 ring, staging, full, empty;
    int *offsets, *first;

    DEVICE explicit SharedMemory(byte* begin) {
        const u32 address = shared_address(begin);
        ring = (address + ALIGNMENT - 1) & ~u32(ALIGNMENT - 1);
        staging = ring + STAGES * STAGE_BYTES;
        full = staging + STAGING_BYTES;
        empty = full + STAGES * 8;
        offsets = reinterpret_cast<int*>(begin + (full - address) + MAX_BARRIER_BYTES);
        first = offsets + EXPERTS + 1;
    }

    DEVICE u32 w(int stage) const { return ring + stage * STAGE_BYTES; }
    DEVICE u32 metadata(int stage) const { return w(stage) + W_BYTES; }
    DEVICE u32 x(int stage) const { return metadata(stage) + METADATA_BYTES; }
};

// The driver's CUtensorMap.
struct alignas(64) TensorMap {
    byte opaque[128];
};

constexpr int WIDTHS = 6;   // of tiles: 8, 16 … 256 tokens

struct Arguments {
    TensorMap values, metadata, dense;   // of all experts
    TensorMap x[WIDTHS];                 // in boxes of 8 · 2^index tokens; those above MAX_TOKENS are not used
    const int* offsets;                  // (EXPERTS + 1): the first row of x of each expert, and one past the last;
    bf16* out;                           // (rows of x, n)
    const float* x_scale;                // (rows of x)
    const float* w_scale;                // (EXPERTS, n)
    Choices choices;                     // if it has ids: offsets are not read but counted from them; they are old
    int choice_count;
    int n;
    int dense_column;                    // column of x that the dense weight begins with
    int offset_words;                    // each as wide as so many int32, the first of which counts
    int offsets_are_old;                 // the kernel before this one did not write them, nor can it have begun before them
    Band bands[2];                       // in the order of execution
    int unused[3];                       // to the alignment of the maps
};
