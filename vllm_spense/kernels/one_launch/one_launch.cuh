// What the one-launch kernel and its callers in Python agree on: how an instance is specialized, its sizes, its
// arguments, its shared memory. instances.py and schedule.py repeat these facts, and
// tests/vllm_spense/kernels/test_nvrtc.py has the compiler compare them.
#pragma once
#include "ptx.cuh"

// An instance; these defaults let the file compile by itself: nvcc -arch=sm_90a -I../jit -cubin one_launch.cu
#ifndef TOKENS
#define TOKENS 32      // of a tile
#define SPARSE_K 256   // columns of W in a sparse step
#define CLUSTER 1      // thread blocks that share a tile
#define SLICES 1       // of tokens, in which the splits of a tile are added up
#define STAGES 7       // of the ring in shared memory
#define OUT_FLOAT 0    // outputs are float32; else bfloat16
#define SCALED 0       // outputs are multiplied by the scales of tokens and rows; else they are raw sums
#endif

static_assert(TOKENS == 8 || TOKENS == 16 || TOKENS == 32 || TOKENS == 64 || TOKENS == 128 || TOKENS == 256);
static_assert(SPARSE_K == 128 || SPARSE_K == 256);
static_assert(CLUSTER == 1 || SLICES == 1);
static_assert(!(OUT_FLOAT && SCALED));

constexpr int WARPGROUP = 128;                       // threads
constexpr int CONSUMERS = 2;                         // warpgroups that multiply
constexpr int CONSUMER_THREADS = CONSUMERS * WARPGROUP;
constexpr int THREADS = WARPGROUP + CONSUMER_THREADS;
constexpr int MMA_ROWS = 64;                         // rows of W in a tensor core instruction
constexpr int ROWS = CONSUMERS * MMA_ROWS;           // rows of W in a tile
constexpr int DENSE_K = 128;                         // columns of W in a dense step: one swizzled row of bytes
constexpr int SPARSE_ROW_BYTES = SPARSE_K / 2;       // two values of four are kept
constexpr int METADATA_TILE_BYTES = 512;             // for 64 rows × 64 columns

// Instructions along K in a step.
constexpr int SPARSE_INSTRUCTIONS = SPARSE_K / 64, DENSE_INSTRUCTIONS = DENSE_K / 32;

// A stage of the ring: W, then x in boxes of 128 columns, then metadata.
constexpr int W_BYTES = ROWS * (DENSE_K > SPARSE_ROW_BYTES ? DENSE_K : SPARSE_ROW_BYTES);
constexpr int X_BOX_BYTES = TOKENS * 128, X_BOXES = SPARSE_K / 128;
constexpr int METADATA_BYTES = CONSUMERS * SPARSE_INSTRUCTIONS * METADATA_TILE_BYTES;
constexpr int STAGE_BYTES = W_BYTES + X_BOX_BYTES * X_BOXES + METADATA_BYTES;
// What is copied into it.
constexpr int SPARSE_STEP_BYTES = ROWS * SPARSE_ROW_BYTES + X_BOX_BYTES * X_BOXES + METADATA_BYTES;
constexpr int DENSE_STEP_BYTES = ROWS * DENSE_K + X_BOX_BYTES;

// Where each consumer warp turns 16 × 16 outputs around. Rows of 48 bytes meet different banks.
constexpr int STAGING_PITCH = 48, WARP_STAGING_BYTES = 16 * STAGING_PITCH;
constexpr int STAGING_BYTES = CONSUMERS * 4 * WARP_STAGING_BYTES;

// Shared memory, by address: the ring begins at a multiple of 1024, as the swizzle asks.
//
//     ring     STAGES × STAGE_BYTES
//     staging  STAGING_BYTES
//     full     STAGES × 8     barriers: the producer's copies into a stage have arrived
//     empty    STAGES × 8     barriers: all consumers have read a stage
//     arrived  8              what SplitKReduction read from its semaphore
constexpr int ALIGNMENT = 1024, MAX_BARRIER_BYTES = 256;
constexpr int SHARED_BYTES = ALIGNMENT + STAGES * STAGE_BYTES + STAGING_BYTES + MAX_BARRIER_BYTES;
static_assert(16 * STAGES + 8 <= MAX_BARRIER_BYTES);
static_assert(SHARED_BYTES <= 227 * 1024, "what a thread block of compute capability 9.0 may have");

struct SharedMemory {
    u32 ring, staging, full, empty, arrived;

    DEVICE explicit SharedMemory(const void* begin) {
        ring = (shared_address(begin) + ALIGNMENT - 1) & ~u32(ALIGNMENT - 1);
        staging = ring + STAGES * STAGE_BYTES;
        full = staging + STAGING_BYTES;
        empty = full + STAGES * 8;
        arrived = empty + STAGES * 8;
    }

    DEVICE u32 w(int stage) const { return ring + stage * STAGE_BYTES; }
    DEVICE u32 x(int stage) const { return w(stage) + W_BYTES; }
    DEVICE u32 metadata(int stage) const { return x(stage) + X_BOX_BYTES * X_BOXES; }
};

// The driver's CUtensorMap.
struct alignas(64) TensorMap {
    byte opaque[128];
};

// A stretch of K of one output tile: the work of a thread block between two outputs.
struct alignas(16) Segment {
    int projection;                // of those that W merges
    int row, row_end;              // of its tile, in the projection's region: first row; one past the region's last
    int column, token;             // of its tile in the output
    int sparse_begin, sparse_end;  // steps of SPARSE_K columns of the sparse weight
    int dense_begin, dense_end;    // steps of DENSE_K columns of the dense weight
    int split, split_count;        // which split of its tile this is, of how many
    int first_partial;             // where the partial sums of the tile's splits lie
    int semaphore;                 // of its tile, if that has several splits
    int last;                      // whether this is the thread block's last segment
    int unused[2];

    DEVICE int sparse_steps() const { return sparse_end - sparse_begin; }
    DEVICE int steps() const { return sparse_steps() + dense_end - dense_begin; }
};

struct Arguments {
    TensorMap x, values, metadata, dense;
    const Segment* segments;          // (thread blocks, segments_each)
    float* partials;                  // accumulators of tiles that have several splits
    u64* semaphores;                  // of such tiles: how many splits of each slice are in memory; zero before and after
    void* out;                        // (tokens, n)
    const float *x_scale, *w_scale;   // (tokens), (n), if SCALED
    int segments_each;
    int tokens, n;
    int dense_column;                 // column of x that the dense weight begins with
};
