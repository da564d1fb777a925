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
#define HOLD 0        // the weight's scales are in registers before the raw sums are there; else only in the L2 cache
#define RAW_FLOAT 0   // raw sums are float32; else bfloat16
#define SCALED 1      // they still lack the scales; else there are none
#endif

constexpr int WARPS = THREADS / 32;
constexpr float LOG2_E = 1.4426950408889634f;

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

// Eight raw sums as they lie in memory. They are read once: only the weight's scales are worth the L1 cache.
struct RawVector {
    uint4 words[sizeof(Raw) / 2];

    DEVICE void load(const Raw* from) {
#pragma unroll
        for (int i = 0; i < sizeof(Raw) / 2; ++i) words[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
    }

    DEVICE void unpack(float (&v)[WIDTH]) const { ::load(reinterpret_cast<const Raw*>(words), v); }
};

// The largest values of rows, from all warps of a cluster, which send theirs to every block.
struct Largest {
    float of_warps[TOKENS][CLUSTER * WARPS];

    DEVICE void send(const float (&mine)[TOKENS], u32 rank) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            float largest = mine[t];
#pragma unroll
            for (int offset = 16; offset; offset /= 2)
                largest = max_nan(__shfl_xor_sync(~0u, largest, offset), largest);
            float* to = &of_warps[t][rank * WARPS + warp];
            if (CLUSTER == 1 && lane == 0) *to = largest;
            if (CLUSTER > 1 && lane < CLUSTER) st_cluster_f32(shared_address(to), lane, largest);
        }
    }

    DEVICE void receive(float (&largest)[TOKENS]) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            largest[t] = 0;
#pragma unroll
            for (int first = 0; first < CLUSTER * WARPS; first += 32)
                if (first + lane < CLUSTER * WARPS)
                    largest[t] = max_nan(of_warps[t][first + lane], largest[t]);
#pragma unroll
            for (int offset = 16; offset; offset /= 2)
                largest[t] = max_nan(__shfl_xor_sync(~0u, largest[t], offset), largest[t]);
        }
    }
};

// SiLU(gate) · up. Where ftz makes a difference the value is far below the smallest scale.
DEVICE float silu_mul(float gate, float up) { return div_approx_ftz(gate, 1 + ex2_approx_ftz(gate * -LOG2_E)) * up; }

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

extern "C" __global__ CLUSTERED __launch_bounds__(THREADS, 1)
void silu_mul_quant(const __grid_constant__ Arguments arguments) {
    __shared__ Largest shared;
#if CLUSTER > 1
    const u32 rank = cluster_ctarank();
    // Nobody may write into a block's shared memory before it runs.
    barrier_cluster_arrive_relaxed();
#else
    const u32 rank = 0;
#endif
    // The next kernel waits for this one's end, but may fetch its weights meanwhile.
    griddepcontrol_launch_dependents();
    const int size = arguments.size, boundary = arguments.boundary, tokens = arguments.tokens;
    const int first = blockIdx.x / CLUSTER * TOKENS, thread = threadIdx.x;
    const auto place = [&](int vector) { return ((vector * CLUSTER + int(rank)) * THREADS + thread) * WIDTH; };

    float gate_scale[HOLD ? VECTORS : 1][WIDTH], up_scale[HOLD ? VECTORS : 1][WIDTH];
    const auto load_scales = [&](int vector, int at) {
        load(arguments.w_scale + at, gate_scale[HOLD ? vector : 0]);
        load(arguments.w_scale + size + at, up_scale[HOLD ? vector : 0]);
    };
    // The weight's scales are there before the previous kernel ends.
    if (SCALED) {
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) {
            const int at = place(vector);
            if (at >= size) break;
            if (HOLD) {
                load_scales(vector, at);
            } else {
                prefetch_l2(arguments.w_scale + at);
                prefetch_l2(arguments.w_scale + size + at);
            }
        }
    }

    RawVector gates[TOKENS][VECTORS], ups[TOKENS][VECTORS];
    float x_scales[TOKENS];
    griddepcontrol_wait();
    // All loads are under way before the first value is needed.
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        if (first + t >= tokens) break;
        x_scales[t] = SCALED ? __ldcg(arguments.x_scale + first + t) : 1;
        const Raw* row = arguments.raw + u64(first + t) * 2 * size;
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) {
            const int at = place(vector);
            if (at >= size) break;
            gates[t][vector].load(row + (at < boundary ? at : at + boundary));
            ups[t][vector].load(row + (at < boundary ? at + boundary : at + size));
        }
    }

    float values[TOKENS][VECTORS][WIDTH], largest[TOKENS] = {};
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) {
        const int at = place(vector), held = HOLD ? vector : 0;
        if (at >= size) break;
        if (SCALED && !HOLD) load_scales(vector, at);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if (first + t >= tokens) break;
            float gate[WIDTH], up[WIDTH];
            gates[t][vector].unpack(gate);
            ups[t][vector].unpack(up);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                const float g = SCALED ? gate[i] * x_scales[t] * gate_scale[held][i] : gate[i];
                const float u = SCALED ? up[i] * x_scales[t] * up_scale[held][i] : up[i];
                values[t][vector][i] = silu_mul(g, u);
                largest[t] = max_nan(fabsf(values[t][vector][i]), largest[t]);
            }
        }
    }
#if CLUSTER > 1
    barrier_cluster_wait();
    shared.send(largest, rank);
    cluster_sync();
#else
    shared.send(largest, rank);
    __syncthreads();
#endif
    shared.receive(largest);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        if (first + t >= tokens) break;
        const float scale = max_nan(largest[t] / LARGEST, SMALLEST_SCALE), inverse = 1 / scale;
        if (rank == 0 && thread == 0) arguments.scale[first + t] = scale;
#pragma unroll
        for (int vector = 0; vector < VECTORS; ++vector) {
            const int at = place(vector);
            if (at >= size) break;
            store_fp8(arguments.out + u64(first + t) * size + at, values[t][vector], inverse);
        }
    }
}
