// From the accumulators of consumers to outputs: Epilogue writes a tile, or a part of one. Where K of a tile is cut into
// splits, their accumulators are added up before: through global memory by SplitKReduction, through the shared memory of
// a cluster by ClusterReduction.
#pragma once
#include "one_launch.cuh"

// Four consecutive accumulators are a quad: those of rows r and r + 8 (the last two) for two neighbouring tokens.
constexpr int QUADS = TOKENS / 8;
typedef float Accum[4 * QUADS];

// Where a thread stands among the consumers.
struct ConsumerThread {
    const SharedMemory& shared;
    int group, thread, lane, warp;   // warpgroup among the consumers; thread and warp in it

    DEVICE explicit ConsumerThread(const SharedMemory& shared) : shared(shared) {
        group = threadIdx.x / WARPGROUP - 1;
        thread = threadIdx.x % WARPGROUP;
        lane = thread % 32;
        warp = thread / 32;
    }
};

DEVICE void sync_consumers() { bar_sync_1<CONSUMER_THREADS>(); }

// Writes a thread's outputs of a tile, from accumulators.
struct Epilogue {
    const Segment& segment;
    const Arguments& arguments;
    const ConsumerThread& me;

    DEVICE void store_tile(const Accum& accum) const {
        constexpr int WIDTH = QUADS < 2 ? 1 : 2;
#pragma unroll
        for (int quad = 0; quad < QUADS; quad += WIDTH) store<WIDTH>(&accum[4 * quad], quad);
    }

    // WIDTH quads from `first_quad` on: 16 rows, 8 · WIDTH tokens.
    template <int WIDTH>
    DEVICE void store(const float* quads, int first_quad) const {
        const int row = segment.row + me.group * MMA_ROWS + me.warp * 16, token = segment.token + 8 * first_quad;
        if constexpr (OUT_FLOAT) {
            store_f32<WIDTH>(quads, row, token);
        } else if constexpr (SCALED) {
            float scaled[4 * WIDTH];
#pragma unroll
            for (int i = 0; i < 4 * WIDTH; ++i) {
                const int t = token + i / 4 * 8 + me.lane % 4 * 2 + i % 2, r = row + i % 4 / 2 * 8 + me.lane / 4;
                const bool inside = t < arguments.tokens && r < segment.row_end;
                const int column = segment.column + r - segment.row;
                scaled[i] = inside ? quads[i] * arguments.x_scale[t] * arguments.w_scale[column] : 0;
            }
            store_bf16<WIDTH>(scaled, row, token);
        } else {
            store_bf16<WIDTH>(quads, row, token);
        }
    }

    template <int WIDTH>
    DEVICE void store_f32(const float* quads, int row, int token) const {
        float* out = static_cast<float*>(arguments.out);
#pragma unroll
        for (int i = 0; i < 4 * WIDTH; ++i) {
            const int t = token + i / 4 * 8 + me.lane % 4 * 2 + i % 2, r = row + i % 4 / 2 * 8 + me.lane / 4;
            if (t < arguments.tokens && r < segment.row_end)
                out[u64(t) * arguments.n + segment.column + r - segment.row] = quads[i];
        }
    }

    // Accumulators hold tokens side by side, memory wants rows side by side: each warp turns them in its staging memory.
    template <int WIDTH>
    DEVICE void store_bf16(const float* s, int row, int token) const {
        const int lane = me.lane;
        const u32 staging = me.shared.staging + (me.group * 4 + me.warp) * WARP_STAGING_BYTES;
        // Of the 8 × 8 matrices (rows r and r + 8, of tokens t, then of tokens t + 8) each lane names one row of one.
        const u32 target = staging + (lane / 16 * 8 + lane % 8) * STAGING_PITCH + lane / 8 % 2 * 16;
        __syncwarp();
        if constexpr (WIDTH == 1)
            stmatrix_x2_trans(target, pack_bf16(s[0], s[1]), pack_bf16(s[2], s[3]));
        else
            stmatrix_x4_trans(
                target, pack_bf16(s[0], s[1]), pack_bf16(s[2], s[3]), pack_bf16(s[4], s[5]), pack_bf16(s[6], s[7]));
        __syncwarp();
        const int t = token + lane / 2, r = row + lane % 2 * 8;
        if (lane < 16 * WIDTH && t < arguments.tokens && r < segment.row_end) {
            const uint4 v = ld_shared_u32x4(staging + lane / 2 * STAGING_PITCH + lane % 2 * 16);
            const u64 at = u64(t) * arguments.n + segment.column + r - segment.row;
            *reinterpret_cast<uint4*>(static_cast<byte*>(arguments.out) + at * 2) = v;
        }
    }
};

// Adds up the splits of a tile through global memory, and writes it. The tile's tokens are cut into SLICES, and each
// slice is finished by the last split that arrives there. With two splits and four slices:
//
//     slice             0          1          2          3
//     split 0 owns      ×                     ×                1. store the partial sums of the slices that others own,
//     split 1 owns                 ×                     ×        and count that in the tile's semaphore
//                                                              2. poll it up to MAX_POLLS times for one's own slices
//     semaphore      ┌──────────┬──────────┬──────────┬────    3. own slices that all others have stored: add them up
//     (u64, a byte   │ splits   │ splits   │ splits   │           with one's own accumulators, write the outputs
//     for each)      │ stored   │ stored   │ stored   │        4. own slices that are late: store them too; whoever
//                    └──────────┴──────────┴──────────┴────       stores last finishes them
//
// So splits that end together share the work, and nobody waits for one that may not have begun. Whoever finishes a slice
// sets its byte back to zero. A set of slices is a number with a byte for each, 1 if it is in the set.
struct SplitKReduction {
    const Accum& accum;
    const Segment& segment;
    const Arguments& arguments;
    const ConsumerThread& me;

    static constexpr int PARTIAL_QUADS = QUADS * CONSUMER_THREADS, SLICE_QUADS = QUADS / SLICES;
    static constexpr int MAX_POLLS = SLICES > 1 ? 40 : 0;   // most of a microsecond each
    static constexpr u64 ALL = ~u64(0) / 255 >> 8 * (8 - SLICES);

    DEVICE void reduce_and_store() const {
        u64 own = 0;
        for (int slice = segment.split; slice < SLICES; slice += segment.split_count) own |= u64(1) << 8 * slice;
        u64 mine = lacking_one(publish(ALL ^ own, own));   // slices to finish here
        const u64 direct = mine & own;                     // whose own split need not go through memory
        if (const u64 late = own ^ direct) mine |= lacking_one(publish(late, 0)) & late;
        if (threadIdx.x == WARPGROUP && mine) atomicAdd(semaphore(), direct - mine * segment.split_count);
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice)
            if (mine >> 8 * slice & 1) finish(slice);
    }

    DEVICE u64* semaphore() const { return &arguments.semaphores[segment.semaphore]; }

    // The slices of which all splits but one were counted.
    DEVICE u64 lacking_one(u64 arrived) const {
        u64 slices = 0;
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice)
            if ((arrived >> 8 * slice & 255) == segment.split_count - 1) slices |= u64(1) << 8 * slice;
        return slices;
    }

    DEVICE float4* partial(int split, int quad) const {
        float4* partials = reinterpret_cast<float4*>(arguments.partials);
        return partials + u64(segment.first_partial + split) * PARTIAL_QUADS + quad * CONSUMER_THREADS + threadIdx.x -
            WARPGROUP;
    }

    DEVICE float4 own_quad(int quad) const {
        const float* s = &accum[4 * quad];
        return make_float4(s[0], s[1], s[2], s[3]);
    }

    // Stores `slices` of this split. Returns how many splits of each slice had been there; of `awaited` ones, some time
    // later. The semaphore's own order is the only fence.
    DEVICE u64 publish(u64 slices, u64 awaited) const {
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad)
            if (slices >> 8 * (quad / SLICE_QUADS) & 1) __stcg(partial(segment.split, quad), own_quad(quad));
        sync_consumers();
        u64 arrived;
        if (threadIdx.x == WARPGROUP) {
            arrived = atom_add_acq_rel_gpu(semaphore(), slices);
            for (int poll = 0; poll < MAX_POLLS && awaited & ~lacking_one(arrived); ++poll) {
                const u64 now = ld_acquire_gpu(semaphore());
                arrived = now & awaited * 255 | arrived & ~(awaited * 255);
            }
            st_shared_u64(me.shared.arrived, arrived);
        }
        sync_consumers();
        return ld_shared_u64(me.shared.arrived);
    }

    DEVICE void finish(int slice) const {
        // Loads of a thread in flight, of so many quads of so many splits: they come from far away.
        constexpr int QUADS_AT_ONCE = SLICE_QUADS < 4 ? SLICE_QUADS : 4, SPLITS_AT_ONCE = 3;
        constexpr int AT_ONCE = SPLITS_AT_ONCE * QUADS_AT_ONCE, WIDTH = QUADS_AT_ONCE < 2 ? 1 : 2;
#pragma unroll
        for (int start = slice * SLICE_QUADS; start < (slice + 1) * SLICE_QUADS; start += QUADS_AT_ONCE) {
            float4 total[QUADS_AT_ONCE];
            for (int first = 0; first < segment.split_count; first += SPLITS_AT_ONCE) {
                float4 quads[SPLITS_AT_ONCE][QUADS_AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    const int split = first + i / QUADS_AT_ONCE, quad = start + i % QUADS_AT_ONCE;
                    float4& q = quads[i / QUADS_AT_ONCE][i % QUADS_AT_ONCE];
                    q = own_quad(quad);
                    if (split != segment.split && split < segment.split_count) q = __ldcg(partial(split, quad));
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    const int split = first + i / QUADS_AT_ONCE;
                    float4 &t = total[i % QUADS_AT_ONCE], &q = quads[i / QUADS_AT_ONCE][i % QUADS_AT_ONCE];
                    if (split < segment.split_count)
                        t = split ? make_float4(t.x + q.x, t.y + q.y, t.z + q.z, t.w + q.w) : q;
                }
            }
#pragma unroll
            for (int i = 0; i < QUADS_AT_ONCE; i += WIDTH)
                Epilogue{segment, arguments, me}.store<WIDTH>(&total[i].x, start + i);
        }
    }
};

// Adds up the splits of a tile through the shared memory of a cluster, and writes it: thread block r of the cluster gets
// quads [r · SHARE, (r + 1) · SHARE) of all. They are sent into its ring, which nobody needs any more, because a cluster
// computes one tile only:
//
//     ring of block r   ┌───────────────┬───────────────┬─ …
//                       │ from block 0  │ from block 1  │      each SHARE quads of every thread
//                       └───────────────┴───────────────┴─ …
struct ClusterReduction {
    const Accum& accum;
    const Segment& segment;
    const Arguments& arguments;
    const ConsumerThread& me;

    static constexpr int SHARE = (QUADS + CLUSTER - 1) / CLUSTER;
    static constexpr int QUAD_BYTES = CONSUMER_THREADS * 16, SHARE_BYTES = SHARE * QUAD_BYTES;
    static_assert(CLUSTER == 1 || CLUSTER * SHARE_BYTES <= STAGES * STAGE_BYTES);

    // Every thread of the cluster has to call cluster_sync as often as this does.
    DEVICE void reduce_and_store() const {
        const int rank = cluster_ctarank();
        const u32 mine = me.shared.ring + (threadIdx.x - WARPGROUP) * 16;
        cluster_sync();
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad) {
            const float* s = &accum[4 * quad];
            st_cluster_f32x4(
                mine + rank * SHARE_BYTES + quad % SHARE * QUAD_BYTES, quad / SHARE, s[0], s[1], s[2], s[3]);
        }
        cluster_sync();
        for (int quad = 0; quad < SHARE && rank * SHARE + quad < QUADS; ++quad) {
            float total[4] = {};
#pragma unroll
            for (int from = 0; from < CLUSTER; ++from) {
                const float4 s = ld_shared_f32x4(mine + from * SHARE_BYTES + quad * QUAD_BYTES);
                const float values[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) total[i] += values[i];
            }
            Epilogue{segment, arguments, me}.store<1>(total, rank * SHARE + quad);
        }
    }
};
