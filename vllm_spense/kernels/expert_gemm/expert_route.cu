// From tokens and their choices of experts to the GEMM's input, in one launch: each token in FP8 with its scale, once for
// every expert that it has chosen, sorted by expert; and where each expert's rows begin.
//
// One thread block for each token, and one more for the offsets. A row's place is the number of choices that come before
// it: of earlier experts, or of the same expert and an earlier token. Up to some thousand choices every block counts them
// itself; with more, expert_ranks.cu has counted them before (RANKED). The order is always the same, so results repeat.
#include "elementwise.cuh"
#include "expert_route.cuh"

#ifndef THREADS
#define THREADS 256   // of a block
#define VECTORS 1     // of eight values that a thread has in a row
#define TOP_K 8       // experts of a token
#define EXPERTS 128   // of this rank
#define RANKED 0      // expert_ranks.cu ran before
#endif

constexpr int WARPS = THREADS / 32, CHUNK = 1024;

struct Arguments {
    const bf16* x;            // (tokens, size), rows x_stride apart
    Choices choices;
    byte* out;                // (tokens · TOP_K, size): rows of other ranks' experts are missing at its end
    float* scale;             // (tokens · TOP_K)
    int* offsets;             // (EXPERTS + 1): the first row of each expert, and one past the last; not if RANKED
    int* places;              // (tokens, TOP_K): the row of each choice, or −1; if RANKED: on entry its rank in its chunk
    const int* chunks;        // RANKED: (chunks of CHUNK choices, EXPERTS): the row of the first of each
    int tokens, size, x_stride;
};

// The sum of every thread's; all threads get it.
template <int COUNT>
DEVICE void sum_block(int (&values)[COUNT], int (&shared)[WARPS][COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        values[i] = __reduce_add_sync(~0u, values[i]);
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        values[i] = 0;
        for (int warp = 0; warp < WARPS; ++warp) values[i] += shared[warp][i];
    }
}

// Where the rows of a token's choices lie.
DEVICE void find_places(const Arguments& arguments, int token, int (&places)[TOP_K]) {
    int experts[TOP_K];
#pragma unroll
    for (int j = 0; j < TOP_K; ++j) experts[j] = arguments.choices[token * TOP_K + j];
#if RANKED
#pragma unroll
    for (int j = 0; j < TOP_K; ++j) {
        const int i = token * TOP_K + j;
        places[j] = experts[j] < 0 ? 0 : arguments.places[i] + arguments.chunks[i / CHUNK * EXPERTS + experts[j]];
    }
    // Thread 0 writes over what the others read.
    __syncthreads();
#else
    __shared__ int of_warps[WARPS][TOP_K];
#pragma unroll
    for (int j = 0; j < TOP_K; ++j) places[j] = 0;
    for (int i = threadIdx.x; i < arguments.tokens * TOP_K; i += THREADS) {
        const int other = arguments.choices[i];
#pragma unroll
        for (int j = 0; j < TOP_K; ++j)
            places[j] += other >= 0 && (other < experts[j] || (other == experts[j] && i < token * TOP_K + j));
    }
    sum_block(places, of_warps);
#endif
#pragma unroll
    for (int j = 0; j < TOP_K; ++j)
        if (experts[j] < 0) places[j] = -1;
}

#if !RANKED
DEVICE void store_offsets(const Arguments& arguments) {
    __shared__ int counts[EXPERTS];
    count_choices<EXPERTS, THREADS>(counts, arguments.choices, [&] { return arguments.tokens * TOP_K; });
    if (threadIdx.x < 32) sum_up<EXPERTS>(arguments.offsets, [&](int expert) { return counts[expert]; });
}
#endif

extern "C" __global__ __launch_bounds__(THREADS) void expert_route(const __grid_constant__ Arguments arguments) {
    __shared__ float largest_of_warps[WARPS];
    const int token = blockIdx.x, thread = threadIdx.x, size = arguments.size;
    griddepcontrol_wait();
    // Not earlier: the next kernel reads what this one's predecessors wrote without waiting.
    griddepcontrol_launch_dependents();
#if !RANKED
    if (token == arguments.tokens) {
        store_offsets(arguments);
        return;
    }
#endif
    float values[VECTORS][WIDTH], largest = 0;
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
        const int at = (vector * THREADS + thread) * WIDTH;
        if (at >= size) break;
        load(arguments.x + u64(token) * arguments.x_stride + at, values[vector]);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) largest = max_nan(fabsf(values[vector][i]), largest);
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) largest = max_nan(__shfl_xor_sync(~0u, largest, offset), largest);
    if (thread % 32 == 0) largest_of_warps[thread / 32] = largest;
    int places[TOP_K];
    find_places(arguments, token, places);   // synchronizes all threads
    largest = 0;
    for (int warp = 0; warp < WARPS; ++warp) largest = max_nan(largest_of_warps[warp], largest);
    const float scale = max_nan(largest / LARGEST, SMALLEST_SCALE), inverse = 1 / scale;
    if (thread == 0) {
#pragma unroll
        for (int j = 0; j < TOP_K; ++j) {
            arguments.places[token * TOP_K + j] = places[j];
            if (places[j] >= 0) arguments.scale[places[j]] = scale;
        }
    }
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
        const int at = (vector * THREADS + thread) * WIDTH;
        if (at >= size) break;
#pragma unroll
        for (int j = 0; j < TOP_K; ++j)
            if (places[j] >= 0) store_fp8(arguments.out + u64(places[j]) * size + at, values[vector], inverse);
    }
}
