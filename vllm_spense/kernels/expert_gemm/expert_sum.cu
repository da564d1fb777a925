// out[t] = Σ_j weight[t, j] · y[place[t, j]]: what a token's experts computed, by the router's weights.
#include "elementwise.cuh"

#ifndef THREADS
#define THREADS 128   // of a block
#define TOP_K 8       // experts of a token
#endif

struct Arguments {
    const bf16* y;            // (rows, n)
    const int* places;        // (tokens, TOP_K): rows of y; negative: another rank's
    const float* weights;     // (tokens, TOP_K)
    bf16* out;                // (tokens, n)
    int n, blocks_each;       // of a token
};

extern "C" __global__ __launch_bounds__(THREADS) void expert_sum(const __grid_constant__ Arguments arguments) {
    const int token = blockIdx.x / arguments.blocks_each;
    const int column = (blockIdx.x % arguments.blocks_each * THREADS + threadIdx.x) * WIDTH;
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    if (column >= arguments.n) return;
    float sums[WIDTH] = {}, rows[TOP_K][WIDTH];
    // All loads first: they come from far away.
#pragma unroll
    for (int j = 0; j < TOP_K; ++j) {
        const int place = arguments.places[token * TOP_K + j];
        if (place >= 0) load(arguments.y + u64(place) * arguments.n + column, rows[j]);
    }
#pragma unroll
    for (int j = 0; j < TOP_K; ++j) {
        if (arguments.places[token * TOP_K + j] < 0) continue;
        const float weight = arguments.weights[token * TOP_K + j];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sums[i] += weight * rows[j][i];
    }
    store(arguments.out + u64(token) * arguments.n + column, sums);
}
