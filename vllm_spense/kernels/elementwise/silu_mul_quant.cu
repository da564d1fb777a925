// From gate_up's raw sums to down's input: scales, SiLU, product, and FP8 with one scale for each token, in one launch.
//
// A long row is divided among a cluster of thread blocks, because a decode step has fewer tokens than the chip has
// multiprocessors. They agree on the row's largest value through their shared memory. A short one is one block's.
#include "elementwise.cuh"

#ifndef THREADS
#define THREADS 192   // of a block
#define VECTORS 1     // of eight values that a thread has in a row
#define CLUSTER 8     // blocks for a row
#define TOKENS 1      // that a cluster takes at once: it reads the weight's scales once for all, and more is in flight
#define RAW_FLOAT 0   // raw sums are float32; else bfloat16
#define SCALED 1      // they still lack the scales; else there are none
#endif

constexpr int WARPS = THREADS / 32;

#if RAW_FLOAT
typedef float Raw;
#else
typedef bf16 Raw;
#endif

struct Arguments {
    const Raw* raw;           // (tokens, 2 · size): [gate sparse | up sparse | gate dense | up dense]
    const float* x_scale;     // (tokens), if SCALED
    const float* w_scale;     // (2 · size), if SCALED
    byte* out;                // (tokens, size)
    float* scale;             // (tokens)
    int tokens, size;
    int boundary;             // columns of a sparse region
};

// Of each token the largest value of the whole row, from the warps' of every block.
DEVICE void largest_of_row(const float (&of_warps)[WARPS][TOKENS], u32 rank, float (&largest)[TOKENS]) {
    __syncthreads();
#if CLUSTER == 1
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        largest[t] = 0;
        for (int warp = 0; warp < WARPS; ++warp) largest[t] = larger(of_warps[warp][t], largest[t]);
    }
#else
    __shared__ float of_blocks[CLUSTER][TOKENS];
    const int thread = threadIdx.x;
    barrier_cluster_wait();
    if (thread < CLUSTER * TOKENS) {
        const int to = thread / TOKENS, t = thread % TOKENS;
        float mine = 0;
        for (int warp = 0; warp < WARPS; ++warp) mine = larger(of_warps[warp][t], mine);
        st_cluster_f32(shared_address(&of_blocks[rank][t]), to, mine);
    }
    cluster_sync();
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        largest[t] = 0;
#pragma unroll
        for (int block = 0; block < CLUSTER; ++block) largest[t] = larger(of_blocks[block][t], largest[t]);
    }
#endif
}

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

extern "C" __global__ CLUSTERED __launch_bounds__(THREADS)
void silu_mul_quant(const __grid_constant__ Arguments arguments) {
    __shared__ float of_warps[WARPS][TOKENS];
#if CLUSTER > 1
    const u32 rank = cluster_ctarank();
    // Nobody may write into a block's shared memory before it runs.
    barrier_cluster_arrive_relaxed();
#else
    const u32 rank = 0;
#endif
    // The next kernel waits for this one's end, but may fetch its weights meanwhile.
    griddepcontrol_launch_dependents();
    const int size = arguments.size, boundary = arguments.boundary, first = blockIdx.x / CLUSTER * TOKENS;
    const int count = min(TOKENS, arguments.tokens - first);
    const int thread = threadIdx.x, lane = thread % 32;
    const auto place = [&](int vector) { return ((vector * CLUSTER + int(rank)) * THREADS + thread) * WIDTH; };

    float values[TOKENS][VECTORS][WIDTH], largest[TOKENS] = {};
    griddepcontrol_wait();
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
        const int at = place(vector);
        if (at >= size) break;
        float gate_scale[WIDTH], up_scale[WIDTH];
        if (SCALED) {
            load(arguments.w_scale + at, gate_scale);
            load(arguments.w_scale + size + at, up_scale);
        }
        const int gate_at = at < boundary ? at : at + boundary, up_at = at < boundary ? at + boundary : at + size;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if (t >= count) break;
            const u64 row = u64(first + t) * 2 * size;
            const float scale = SCALED ? arguments.x_scale[first + t] : 1;
            float gate[WIDTH], up[WIDTH];
            load(arguments.raw + row + gate_at, gate);
            load(arguments.raw + row + up_at, up);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                const float g = SCALED ? gate[i] * scale * gate_scale[i] : gate[i];
                const float u = SCALED ? up[i] * scale * up_scale[i] : up[i];
                const float value = __fdividef(g, 1 + __expf(-g)) * u;
                values[t][vector][i] = value;
                largest[t] = larger(fabsf(value), largest[t]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
        for (int offset = 16; offset; offset /= 2)
            largest[t] = larger(__shfl_xor_sync(~0u, largest[t], offset), largest[t]);
        if (lane == 0) of_warps[thread / 32][t] = largest[t];
    }
    largest_of_row(of_warps, rank, largest);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        if (t >= count) break;
        const float scale = larger(largest[t] / LARGEST, SMALLEST_SCALE), inverse = 1 / scale;
        if (rank == 0 && thread == 0) arguments.scale[first + t] = scale;
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) {
            const int at = place(vector);
            if (at >= size) break;
            store_fp8(arguments.out + u64(first + t) * size + at, values[t][vector], inverse);
        }
    }
}
