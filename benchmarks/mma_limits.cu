// What limits FP8 products of a 2:4 weight on a multiprocessor: the loop of a GEMM kernel without its GEMM. Two consumer
// warpgroups multiply what lies in a ring in shared memory, random bytes, and one thread copies into it what such a tile
// needs. What W takes on its way to the tensor cores is a choice, and each part may be left out:
//
//     W_PATH   0  copied into shared memory, where the tensor cores read it
//              1  registers, never loaded: what x alone allows
//              2  loaded from global memory to registers
//              3  copied into shared memory, loaded from there to registers
//     COPIES   quarters of a step's bytes that are copied into shared memory; 0: what reading it alone allows
#include "ptx.cuh"
#include "wgmma.cuh"

#ifndef TOKENS
#define TOKENS 256     // of a tile
#define ROW_TILES 1    // of 64 rows, for each consumer
#define SPARSE 1
#define W_PATH 0
#define COPIES 4
#define STAGES 4
#endif

constexpr int STEP_K = 128;                                  // columns of a step
constexpr int INSTRUCTIONS = SPARSE ? STEP_K / 64 : STEP_K / 32;
constexpr int ROWS = 128 * ROW_TILES;
constexpr int ROW_BYTES = SPARSE ? STEP_K / 2 : STEP_K;
constexpr int X_BYTES = TOKENS * STEP_K, W_BYTES = ROWS * ROW_BYTES;
constexpr bool W_IN_SHARED = W_PATH == 0 || W_PATH == 3;
constexpr int COPIED = (X_BYTES + (W_IN_SHARED ? W_BYTES : 0)) * COPIES / 4, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int AHEAD = W_PATH != 2 ? 1 : SPARSE ? 3 : 2;        // steps whose W is loaded before it is needed

typedef float Accum[TOKENS / 2];

#define DEFINE_FROM_REGISTERS(N, COUNT, A, B, C, D, X, METADATA)                                                       \
    template <int K>                                                                                                   \
    DEVICE void multiply_registers(float (&accum)[COUNT], const uint4& w, u64 x, u32 metadata) {                       \
        if constexpr (K == 64)                                                                                         \
            asm volatile(                                                                                              \
                "wgmma.mma_async.sp.sync.aligned.m64n" #N "k64.f32.e4m3.e4m3"                                          \
                " {" REGISTERS_##COUNT "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #X ", %" #METADATA ", 0, 1, 1, 1;" \
                : ACCUM_##COUNT(0) : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(x), "r"(metadata));                   \
        else                                                                                                           \
            asm volatile(                                                                                              \
                "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3"                                             \
                " {" REGISTERS_##COUNT "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #X ", 1, 1, 1;"                    \
                : ACCUM_##COUNT(0) : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(x));                                  \
    }

DEFINE_FROM_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69)
DEFINE_FROM_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133)

DEVICE void cp_async_bulk(u32 to, const void* from, int bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

struct Arguments {
    const byte *x, *w;    // each of `bytes`, a power of two: random, and so few that they stay in the L2 cache
    long long* cycles;    // (thread blocks): of the loop
    float* sums;          // (thread blocks, 256): what keeps the compiler from leaving products out
    long long bytes;
    int steps;
};

DEVICE uint4 load_w(const Arguments& arguments, u64 at) {
    const u64 offset = at & u64(arguments.bytes - 1);
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(arguments.w + offset));
    return v;
}

extern "C" __global__ __launch_bounds__(384, 1) void mma_limits(const __grid_constant__ Arguments arguments) {
    extern __shared__ byte raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u, full = ring + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
    for (u32 at = threadIdx.x * 16; at < STAGES * STAGE_BYTES; at += 384 * 16) {
        const uint4 v = load_w(arguments, at + blockIdx.x * 4096ull);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(ring + at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
    }
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(full + 8 * stage, 1);
            mbarrier_init(empty + 8 * stage, 2);
        }
        fence_mbarrier_init();
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x < 128) {
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0 && COPIES) {
            u64 at = blockIdx.x * 65536ull;
            for (int step = 0; step < arguments.steps; ++step) {
                const int stage = step % STAGES;
                mbarrier_wait(empty + 8 * stage, (step / STAGES & 1) ^ 1);
                mbarrier_arrive_expect_tx(full + 8 * stage, COPIED);
                const u64 offset = at & u64(arguments.bytes / 2 - 1);
                cp_async_bulk(ring + stage * STAGE_BYTES, arguments.x + offset, COPIED, full + 8 * stage);
                at += COPIED;
            }
        }
    } else {
        setmaxnreg_inc<232>();
        const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, lane = thread % 32;
        Accum accum[ROW_TILES];
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
            for (int i = 0; i < TOKENS / 2; ++i) accum[tile][i] = 0;
        // Each four of a row's columns keep the first and the third: 0b1000 twice for every byte.
        const u32 metadata = 0x88888888;
        uint4 w[AHEAD][ROW_TILES][INSTRUCTIONS];
        const u64 begin = (blockIdx.x * 2ull + group) * 1048576ull + thread * 16;
        u64 at = begin;
        const auto load_step = [&](uint4 (&to)[ROW_TILES][INSTRUCTIONS]) {
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
                for (int k = 0; k < INSTRUCTIONS; ++k, at += 2048) to[tile][k] = load_w(arguments, at);
        };
        if (W_PATH == 1 || W_PATH == 2)
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) load_step(w[i]);
        const long long start = clock64();
        for (int first = 0; first < arguments.steps; first += AHEAD) {
#pragma unroll
            for (int ahead = 0; ahead < AHEAD; ++ahead) {
                const int step = first + ahead, stage = step % STAGES;
                if (COPIES) mbarrier_wait(full + 8 * stage, step / STAGES & 1);
                const u32 x = ring + stage * STAGE_BYTES, w_shared = x + X_BYTES + group * ROW_TILES * 64 * ROW_BYTES;
                if (W_PATH == 3) {
#pragma unroll
                    for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
                        for (int k = 0; k < INSTRUCTIONS; ++k) {
                            // 32 rows of 16 bytes, which lie in a pattern that meets every bank once.
                            const u32 from = w_shared + tile * 64 * ROW_BYTES + (thread / 32 * 32 + lane) * 16 + k * 2048;
                            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                                : "=r"(w[0][tile][k].x), "=r"(w[0][tile][k].y), "=r"(w[0][tile][k].z), "=r"(w[0][tile][k].w)
                                : "r"(from) : "memory");
                        }
                }
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < INSTRUCTIONS; ++k)
#pragma unroll
                    for (int tile = 0; tile < ROW_TILES; ++tile) {
                        const u64 x_descriptor = wgmma_descriptor<SWIZZLE_128B>(x + k * (SPARSE ? 64 : 32));
                        if constexpr (W_PATH == 0) {
                            const u64 w_descriptor = wgmma_descriptor<SPARSE ? SWIZZLE_64B : SWIZZLE_128B>(
                                w_shared + tile * 64 * ROW_BYTES + k * 32);
                            if constexpr (SPARSE) Wgmma<TOKENS>::sparse(accum[tile], w_descriptor, x_descriptor, metadata);
                            else Wgmma<TOKENS>::dense(accum[tile], w_descriptor, x_descriptor);
                        } else {
                            multiply_registers<SPARSE ? 64 : 32>(accum[tile], w[ahead][tile][k], x_descriptor, metadata);
                        }
                    }
                wgmma_commit_and_wait();
                if (COPIES && thread == 0) mbarrier_arrive(empty + 8 * stage);
                if (W_PATH == 2) load_step(w[ahead]);
            }
        }
        const long long end = clock64();
        float sum = 0;
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
            for (int i = 0; i < TOKENS / 2; ++i) sum += accum[tile][i];
        arguments.sums[blockIdx.x * 256 + threadIdx.x - 128] = sum;
        if (threadIdx.x == 128) arguments.cycles[blockIdx.x] = end - start;
    }
}
