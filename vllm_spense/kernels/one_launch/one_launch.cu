// out[m, n] = Σ_k x[m, k] · W[n, k] with FP8 E4M3 x and W, W 2:4 in one region and dense in the other, in one launch.
//
// W is the left operand of the tensor core, because only that side may be sparse; x is the right one. What each thread
// block computes stands in a table (schedule.py): segments, each a stretch of K of one output tile of 128 rows of W ×
// TOKENS. A thread block has three warpgroups:
//
//     warpgroup 0: producer        warpgroup 1: consumer          warpgroup 2: consumer
//     one thread starts copies     rows 0 … 63 of the tile        rows 64 … 127
//              │                   accum: 64 × TOKENS float32     accum
//              │ TMA                        ▲ wgmma                      ▲ wgmma
//              ▼                            │                            │
//     ┌─────────────────┬─────────────────┬─┴─────────────── … ┬─────────┴───────┐
//     │ stage 0         │ stage 1         │ stage 2            │ stage STAGES−1  │   ring in shared memory
//     │ W  x  metadata  │ W  x  metadata  │ W  x  metadata     │ W  x  metadata  │
//     └─────────────────┴─────────────────┴─────────────────── … ┴───────────────┘
//        producer ── full[stage]: all bytes of a step are there ──▶ consumers
//        producer ◀── empty[stage]: both consumers have read it ─── consumers
//
// A step takes one stage: SPARSE_K columns of a compressed weight with their metadata, or DENSE_K of a dense one.
//
// Where there are fewer tiles than multiprocessors, K of a tile is cut into splits, each computed by a thread block of
// its own. They are added up in float32 and always in the same order, so that results repeat to the bit: splits in a
// cluster through shared memory (ClusterReduction), others through global memory (SplitKReduction). No thread block
// waits for work that may not have begun, so launches on two streams cannot block each other.
#include "one_launch.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

// Four consecutive accumulators are a quad: those of rows r and r + 8 (the last two) for two neighbouring tokens.
constexpr int QUADS = TOKENS / 8;
typedef float Accum[4 * QUADS];

constexpr Swizzle SPARSE_SWIZZLE = SPARSE_ROW_BYTES == 128 ? SWIZZLE_128B : SWIZZLE_64B;

DEVICE void sync_consumers() { bar_sync_1<CONSUMER_THREADS>(); }

// Walks the steps of all segments of a thread block.
struct Cursor {
    const Segment* next;
    Segment segment;
    int step = 0;
    bool done = false;

    DEVICE explicit Cursor(const Segment* first) : next(first) { enter(); }

    DEVICE void enter() {
        segment = *next++;
        step = 0;
        while (!segment.steps()) {
            done = segment.last;
            if (done) return;
            segment = *next++;
        }
    }

    DEVICE void advance() {
        if (++step < segment.steps()) return;
        done = segment.last;
        if (!done) enter();
    }
};

struct Producer {
    const Arguments& arguments;
    const SharedMemory& shared;
    u64 w_policy, x_policy;   // the L2 cache may drop W first, and x last

    DEVICE Producer(const Arguments& arguments, const SharedMemory& shared) : arguments(arguments), shared(shared) {
        w_policy = createpolicy_evict_first();
        x_policy = createpolicy_evict_last();
        // Tiles of other tokens read the same W.
        if (arguments.tokens > TOKENS) w_policy = x_policy;
    }

    // W is there before the previous kernel ends: only x has to wait for it.
    DEVICE void run(const Segment* first) const {
        Cursor w(first), x(first);
        PipelineState<STAGES> pipe;
        int ahead = 0;
        for (; ahead < STAGES && !w.done; ++ahead, w.advance()) copy_w(w, ahead);
        griddepcontrol_wait();
        // Not earlier: what the next kernel reads without waiting may come from a kernel before the previous one.
        griddepcontrol_launch_dependents();
        for (; ahead; --ahead, x.advance(), pipe.advance()) copy_x(x, pipe.stage);
        for (; !w.done; w.advance(), pipe.advance()) {
            mbarrier_wait(shared.empty + 8 * pipe.stage, pipe.phase ^ 1);
            copy_w(w, pipe.stage);
            copy_x(w, pipe.stage);
        }
    }

    DEVICE void copy_w(const Cursor& at, int stage) const {
        const Segment& segment = at.segment;
        const u32 full = shared.full + 8 * stage;
        const int dense = at.step - segment.sparse_steps();
        if (dense < 0) {
            const int step = segment.sparse_begin + at.step;
            mbarrier_arrive_expect_tx(full, SPARSE_STEP_BYTES);
            cp_async_bulk_tensor_3d(
                shared.w(stage), &arguments.values, step * SPARSE_ROW_BYTES, segment.row, segment.projection, full,
                w_policy);
            // In items of 8 bytes.
            cp_async_bulk_tensor_3d(
                shared.metadata(stage), &arguments.metadata, step * SPARSE_INSTRUCTIONS * METADATA_TILE_BYTES / 8,
                segment.row / 64, segment.projection, full, w_policy);
        } else {
            const int column = (segment.dense_begin + dense) * DENSE_K;
            mbarrier_arrive_expect_tx(full, DENSE_STEP_BYTES);
            cp_async_bulk_tensor_3d(
                shared.w(stage), &arguments.dense, column, segment.row, segment.projection, full, w_policy);
        }
    }

    DEVICE void copy_x(const Cursor& at, int stage) const {
        const Segment& segment = at.segment;
        const int dense = at.step - segment.sparse_steps();
        const int boxes = dense < 0 ? X_BOXES : 1;
        const int column = dense < 0 ? (segment.sparse_begin + at.step) * SPARSE_K
                                     : arguments.dense_column + (segment.dense_begin + dense) * DENSE_K;
        for (int box = 0; box < boxes; ++box)
            cp_async_bulk_tensor_3d(
                shared.x(stage) + box * X_BOX_BYTES, &arguments.x, column + box * 128, segment.token, 0,
                shared.full + 8 * stage, x_policy);
    }
};

struct Consumer {
    const SharedMemory& shared;
    PipelineState<STAGES> pipe;
    int group, thread, lane, warp;   // warpgroup among the consumers; thread and warp in it

    DEVICE explicit Consumer(const SharedMemory& shared) : shared(shared) {
        group = threadIdx.x / WARPGROUP - 1;
        thread = threadIdx.x % WARPGROUP;
        lane = thread % 32;
        warp = thread / 32;
    }

    DEVICE void multiply(Accum& accum, const Segment& segment) {
#pragma unroll
        for (int i = 0; i < 4 * QUADS; ++i) accum[i] = 0;
        for (int step = segment.sparse_begin; step < segment.sparse_end; ++step) {
            mbarrier_wait(shared.full + 8 * pipe.stage, pipe.phase);
            sparse_step(accum);
            release_stage();
        }
        for (int step = segment.dense_begin; step < segment.dense_end; ++step) {
            mbarrier_wait(shared.full + 8 * pipe.stage, pipe.phase);
            dense_step(accum);
            release_stage();
        }
    }

    DEVICE void sparse_step(Accum& accum) const {
        const u32 selector = metadata_selector(lane);
        const u32 w = shared.w(pipe.stage) + group * MMA_ROWS * SPARSE_ROW_BYTES;
        const u32 metadata = shared.metadata(pipe.stage) + group * SPARSE_INSTRUCTIONS * METADATA_TILE_BYTES +
            warp * 128 + lane / 4 * 16;
        u32 words[SPARSE_INSTRUCTIONS];
#pragma unroll
        for (int k = 0; k < SPARSE_INSTRUCTIONS; ++k)
            words[k] = metadata_word(metadata + k * METADATA_TILE_BYTES, selector);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < SPARSE_INSTRUCTIONS; ++k)
            Wgmma<TOKENS>::sparse(
                accum, wgmma_descriptor<SPARSE_SWIZZLE>(w + k * 32),
                wgmma_descriptor<SWIZZLE_128B>(shared.x(pipe.stage) + k / 2 * X_BOX_BYTES + k % 2 * 64), words[k]);
    }

    DEVICE void dense_step(Accum& accum) const {
        const u32 w = shared.w(pipe.stage) + group * MMA_ROWS * DENSE_K;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DENSE_INSTRUCTIONS; ++k)
            Wgmma<TOKENS>::dense(
                accum, wgmma_descriptor<SWIZZLE_128B>(w + k * 32),
                wgmma_descriptor<SWIZZLE_128B>(shared.x(pipe.stage) + k * 32));
    }

    // The other consumer multiplies meanwhile. Until here the tensor cores may still read the metadata's registers.
    DEVICE void release_stage() {
        wgmma_commit_and_wait();
        if (thread == 0) mbarrier_arrive(shared.empty + 8 * pipe.stage);
        pipe.advance();
    }
};

// Writes a thread's outputs of a tile, from accumulators.
struct Epilogue {
    const Segment& segment;
    const Arguments& arguments;
    const Consumer& me;

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
    const Consumer& me;

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
    const Consumer& me;

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

extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
void gemm(const __grid_constant__ Arguments arguments) {
    extern __shared__ byte raw[];
    const SharedMemory shared(raw);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(shared.full + 8 * stage, 1);
            mbarrier_init(shared.empty + 8 * stage, CONSUMERS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    const Segment* segments = arguments.segments + blockIdx.x * arguments.segments_each;
    if (threadIdx.x < WARPGROUP) {
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0) Producer(arguments, shared).run(segments);
        if (CLUSTER > 1) {   // see ClusterReduction
            __syncwarp();
            cluster_sync();
            cluster_sync();
        }
    } else {
        setmaxnreg_inc<232>();
        griddepcontrol_wait();
        Consumer consumer(shared);
        Accum accum;
        for (bool last = false; !last; ++segments) {
            const Segment segment = *segments;
            last = segment.last;
            consumer.multiply(accum, segment);
            if (CLUSTER > 1) ClusterReduction{accum, segment, arguments, consumer}.reduce_and_store();
            else if (segment.split_count > 1) SplitKReduction{accum, segment, arguments, consumer}.reduce_and_store();
            else Epilogue{segment, arguments, consumer}.store_tile(accum);
        }
    }
}
