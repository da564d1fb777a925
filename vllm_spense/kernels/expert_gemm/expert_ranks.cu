// Sorts many tokens' choices of experts in two launches: what expert_route.cu otherwise counts in every block.
//
// expert_ranks: a thread block for each chunk of CHUNK choices numbers those of the same expert, and counts each expert's.
// expert_offsets: one thread block adds the counts of all chunks up. A choice's row is then its rank in its chunk after
// the chunk's first row of its expert.
#include "expert_route.cuh"

#ifndef TOP_K
#define TOP_K 8       // experts of a token
#define EXPERTS 128   // of this rank
#endif

constexpr int CHUNK = 1024, WARPS = CHUNK / 32;   // a thread for each choice

struct Arguments {
    Choices choices;
    int* places;    // (tokens, TOP_K): rank of each choice in its chunk
    int* chunks;    // (chunks, EXPERTS): counts, then the row of the first of each
    int* offsets;   // (EXPERTS + 1)
    int tokens, chunk_count;
};

extern "C" __global__ __launch_bounds__(CHUNK) void expert_ranks(const __grid_constant__ Arguments arguments) {
    // Of each expert: how many choices a warp has, then how many the warps before it have.
    __shared__ unsigned short counts[WARPS][EXPERTS];
    for (int i = threadIdx.x; i < WARPS * EXPERTS; i += CHUNK) counts[i / EXPERTS][i % EXPERTS] = 0;
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    __syncthreads();
    const int i = blockIdx.x * CHUNK + threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int expert = i < arguments.tokens * TOP_K ? arguments.choices[i] : -1;
    const u32 same = __match_any_sync(~0u, expert);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (rank == 0 && expert >= 0) counts[warp][expert] = __popc(same);
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += CHUNK) {
        int sum = 0;
        for (int w = 0; w < WARPS; ++w) {
            const int count = counts[w][e];
            counts[w][e] = sum;
            sum += count;
        }
        arguments.chunks[blockIdx.x * EXPERTS + e] = sum;
    }
    __syncthreads();
    if (expert >= 0) arguments.places[i] = counts[warp][expert] + rank;
}

extern "C" __global__ __launch_bounds__(CHUNK) void expert_offsets(const __grid_constant__ Arguments arguments) {
    static_assert(EXPERTS <= CHUNK, "a thread for each expert");
    __shared__ int of_warps[WARPS];
    const int expert = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    int total = 0;
    if (expert < EXPERTS)
        for (int chunk = 0; chunk < arguments.chunk_count; ++chunk) total += arguments.chunks[chunk * EXPERTS + expert];
    int sum = total;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += other;
    }
    if (lane == 31) of_warps[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += of_warps[w];
    if (expert == 0) arguments.offsets[0] = 0;
    if (expert >= EXPERTS) return;
    arguments.offsets[expert + 1] = sum;
    int row = sum - total;
    for (int chunk = 0; chunk < arguments.chunk_count; ++chunk) {
        int& first = arguments.chunks[chunk * EXPERTS + expert];
        const int count = first;
        first = row;
        row += count;
    }
}
