// What the experts' GEMMs and the kernels around them share: which expert of this rank a token has chosen, and how many
// choices come before each expert's.
#pragma once
#include "ptx.cuh"

struct Choices {
    const int* ids;           // (tokens, TOP_K), each as wide as `words` int32, the first of which counts
    const int* expert_map;    // of all experts: this rank's number of each, negative for others'; null: the same number
    int words;

    // Of choice number i, counted over all tokens; negative if another rank has it.
    DEVICE int operator[](int i) const {
        const int id = ids[u64(i) * words];
        return expert_map && id >= 0 ? expert_map[id] : id;
    }
};

// What follows reads the kernel's arguments where it needs them, by a function or a reference: as values they would stay
// in registers, or have loops unrolled.

// counts[e] = how many of the first `choice_count()` choices are expert e's, for e = 0 … COUNT − 1, in shared memory; all
// threads of the block call it.
template <int COUNT, int BLOCK_THREADS, typename Bound>
DEVICE void count_choices(int* counts, const Choices& choices, Bound choice_count) {
    for (int expert = threadIdx.x; expert < COUNT; expert += BLOCK_THREADS) counts[expert] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < choice_count(); i += BLOCK_THREADS) {
        const int expert = choices[i];
        if (expert >= 0) atomicAdd(&counts[expert], 1);
    }
    __syncthreads();
}

// sums[e] = count(0) + … + count(e − 1), for e = 0 … COUNT; one warp calls it.
template <int COUNT, typename Count>
DEVICE void sum_up(int* const& sums, Count count) {
    int before = 0;
    for (int base = 0; base < COUNT; base += 32) {
        const int expert = base + threadIdx.x;
        int sum = expert < COUNT ? count(expert) : 0;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(~0u, sum, distance);
            if (threadIdx.x >= distance) sum += other;
        }
        if (expert < COUNT) sums[expert + 1] = before + sum;
        before += __shfl_sync(~0u, sum, 31);
    }
    if (threadIdx.x == 0) sums[0] = 0;
}
