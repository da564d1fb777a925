// out[m, n] = Σ_k x[m, k] · W[n, k] with FP8 E4M3 x and W, W 2:4 in one region and dense in the other, in one launch.
//
// W is the left operand of the tensor core, 64 of its rows at a time, because only that side may be sparse; x is the
// right one. One thread copies tiles of both into a ring of shared memory, two groups of four warps multiply. What each
// thread block computes stands in a table (schedule.py): segments, each a stretch of K of one output tile. A tile that
// has several parts is summed in float32, always in the order of its parts: those of a cluster of thread blocks through
// shared memory, others through global memory by whoever finishes last. Nobody depends on work that may not have begun.
//
// Set by the compiler's caller (one_launch.py): TOKENS of a tile, SPARSE_K columns of a sparse step, CLUSTER thread blocks
// that share a tile, SLICES that a tile's sums are added up in, STAGES of the ring, OUT_FLOAT, SCALED, and the functions
// sparse_mma and dense_mma.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char byte;

constexpr int GROUPS = 2;                            // of four warps that multiply
constexpr int GROUP_THREADS = 128;
constexpr int MMA_ROWS = 64;                         // rows of W in one tensor core instruction
constexpr int ROWS = GROUPS * MMA_ROWS;              // of a tile
constexpr int QUADS = TOKENS / 8;                    // of sums that a thread has, see Sums
constexpr int SHARE = (QUADS + CLUSTER - 1) / CLUSTER;   // of them that a thread block of a cluster sums
constexpr int DENSE_K = 128;                         // columns of a dense step: one swizzled row of bytes
constexpr int SPARSE_STEPS = SPARSE_K / 64, DENSE_STEPS = DENSE_K / 32;  // instructions along K
constexpr int SPARSE_ROW_BYTES = SPARSE_K / 2;       // two values are kept of four
constexpr int METADATA_TILE = 512;                   // bytes for 64 rows × 64 columns

constexpr int WEIGHT_BYTES = ROWS * (DENSE_K > SPARSE_ROW_BYTES ? DENSE_K : SPARSE_ROW_BYTES);
constexpr int X_BOX_BYTES = TOKENS * 128, X_BOXES = SPARSE_K / 128;
constexpr int METADATA_BYTES = GROUPS * SPARSE_STEPS * METADATA_TILE;
constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BOX_BYTES * X_BOXES + METADATA_BYTES;
constexpr int SPARSE_STAGE_BYTES = ROWS * SPARSE_ROW_BYTES + X_BOX_BYTES * X_BOXES + METADATA_BYTES;
constexpr int DENSE_STAGE_BYTES = ROWS * DENSE_K + X_BOX_BYTES;

constexpr int TURN_PITCH = 48, TURN_BYTES = 16 * TURN_PITCH;   // of a warp's 16 × 16 outputs in shared memory

struct alignas(64) TensorMap { byte opaque[128]; };

struct Arguments {
    TensorMap x, values, metadata, dense;
    const struct Segment* segments;   // (thread blocks, segments_each)
    float* parts;                     // float32 sums of tiles that have several parts
    u64* arrivals;                    // how many parts of each such tile's slices are there; zero before and after
    void* out;                        // (tokens, n)
    const float *x_scale, *w_scale;   // (tokens), (n): if SCALED, sums are multiplied by them
    int segments_each;
    int tokens, n;
    int dense_column;                 // column of x that the dense weight begins with
};

struct alignas(16) Segment {
    int projection;                     // of those that W merges
    int row, row_end;                   // of its tile: first row, in the projection's region; one past the region's last
    int column, token;                  // of its tile in the output
    int sparse_begin, sparse_end;       // steps of SPARSE_K columns of the sparse weight
    int dense_begin, dense_end;         // steps of DENSE_K columns of the dense weight
    int part, part_count, first_part;   // which part of its tile this is; where the tile's parts lie
    int tile, last;                     // which counter of arrivals; whether this is the thread block's last segment
    int unused[2];

    __device__ __forceinline__ int sparse_steps() const { return sparse_end - sparse_begin; }
    __device__ __forceinline__ int steps() const { return sparse_steps() + dense_end - dense_begin; }
};

__device__ __forceinline__ u32 shared_address(const void* pointer) { return __cvta_generic_to_shared(pointer); }

// Barriers between the copying warp and the multiplying groups.

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ void copy_tile(
    u32 to, const TensorMap* from, int column, int row, int projection, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %4}], [%5], %6;"
        ::"r"(to), "l"(from), "r"(column), "r"(row), "r"(projection), "r"(barrier), "l"(policy) : "memory");
}

__device__ __forceinline__ int rank_in_cluster() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void synchronize_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void synchronize_groups() {
    asm volatile("bar.sync 1, %0;" ::"n"(GROUPS * GROUP_THREADS) : "memory");
}

// Launches overlap: before this, only weights and tables may be read, and nothing written.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Not before the wait: what the next kernel reads without waiting may come from a kernel before the previous one.
__device__ __forceinline__ void let_next_kernel_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Where a tensor core instruction finds a K-major operand: address, and the stride of eight swizzled rows.
enum Swizzle { SWIZZLE_128 = 1, SWIZZLE_64 = 2 };

template <Swizzle swizzle>
__device__ __forceinline__ u64 descriptor(u32 address) {
    constexpr u64 eight_rows = swizzle == SWIZZLE_128 ? 1024 : 512;
    return u64(swizzle) << 62 | (eight_rows >> 4) << 32 | u64(1) << 16 | (address & 0x3ffff) >> 4;
}

constexpr Swizzle SPARSE_SWIZZLE = SPARSE_ROW_BYTES == 128 ? SWIZZLE_128 : SWIZZLE_64;

// A thread's share of a metadata tile: the bytes of four neighbouring threads lie interleaved.
__device__ __forceinline__ u32 metadata_word(u32 address, u32 selector) {
    u32 a, b, c, d;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address));
    return __byte_perm(__byte_perm(a, b, selector), __byte_perm(c, d, selector), 0x5410);
}

struct Ring {
    int stage = 0;
    u32 phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

struct Shared {
    u32 stages, full, empty, turn, arrived;   // addresses
    __device__ __forceinline__ u32 weight(int stage) const { return stages + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 x(int stage) const { return weight(stage) + WEIGHT_BYTES; }
    __device__ __forceinline__ u32 metadata(int stage) const { return x(stage) + X_BOX_BYTES * X_BOXES; }
};

// Walks the steps of all segments.
struct Cursor {
    const Segment* next;
    Segment segment;
    int step = 0;
    bool done = false;

    __device__ __forceinline__ explicit Cursor(const Segment* first) : next(first) { enter(); }

    __device__ __forceinline__ void enter() {
        segment = *next++;
        step = 0;
        while (!segment.steps()) {
            done = segment.last;
            if (done) return;
            segment = *next++;
        }
    }

    __device__ __forceinline__ void advance() {
        if (++step < segment.steps()) return;
        done = segment.last;
        if (!done) enter();
    }
};

struct Copier {
    const Arguments& arguments;
    const Shared& shared;
    u64 once, often;   // the cache may drop weights first and x last

    __device__ __forceinline__ Copier(const Arguments& arguments, const Shared& shared)
        : arguments(arguments), shared(shared) {
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
        asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(often));
        if (arguments.tokens > TOKENS) once = often;
    }

    __device__ __forceinline__ void copy_weight(const Cursor& at, int stage) const {
        const Segment& segment = at.segment;
        const u32 full = shared.full + 8 * stage;
        const int dense = at.step - segment.sparse_steps();
        if (dense < 0) {
            const int step = segment.sparse_begin + at.step;
            barrier_expect(full, SPARSE_STAGE_BYTES);
            copy_tile(
                shared.weight(stage), &arguments.values, step * SPARSE_ROW_BYTES, segment.row, segment.projection, full,
                once);
            copy_tile(
                shared.metadata(stage), &arguments.metadata, step * SPARSE_STEPS * METADATA_TILE / 8, segment.row / 64,
                segment.projection, full, once);
        } else {
            const int column = (segment.dense_begin + dense) * DENSE_K;
            barrier_expect(full, DENSE_STAGE_BYTES);
            copy_tile(
                shared.weight(stage), &arguments.dense, column, segment.row, segment.projection, full, once);
        }
    }

    __device__ __forceinline__ void copy_x(const Cursor& at, int stage) const {
        const Segment& segment = at.segment;
        const int dense = at.step - segment.sparse_steps();
        const int boxes = dense < 0 ? X_BOXES : 1;
        const int column = dense < 0 ? (segment.sparse_begin + at.step) * SPARSE_K
                                     : arguments.dense_column + (segment.dense_begin + dense) * DENSE_K;
        for (int box = 0; box < boxes; ++box)
            copy_tile(
                shared.x(stage) + box * X_BOX_BYTES, &arguments.x, column + box * 128, segment.token, 0,
                shared.full + 8 * stage, often);
    }

    // Weights are there before the previous kernel ends: only x has to wait for it.
    __device__ __forceinline__ void copy_all(const Segment* first) const {
        Cursor weight(first), x(first);
        Ring ring;
        int ahead = 0;
        for (; ahead < STAGES && !weight.done; ++ahead, weight.advance()) copy_weight(weight, ahead);
        wait_for_previous_kernel();
        let_next_kernel_begin();
        for (; ahead; --ahead, x.advance(), ring.advance()) copy_x(x, ring.stage);
        for (; !weight.done; weight.advance(), ring.advance()) {
            barrier_wait(shared.empty + 8 * ring.stage, ring.phase ^ 1);
            copy_weight(weight, ring.stage);
            copy_x(weight, ring.stage);
        }
    }
};

// Four consecutive sums, a quad, are those of rows r and r + 8 (the last two) for two neighbouring tokens.
typedef float Sums[TOKENS / 2];

struct Multiplier {
    const Shared& shared;
    Ring ring;
    int group, thread, lane, warp;

    __device__ __forceinline__ explicit Multiplier(const Shared& shared) : shared(shared) {
        group = threadIdx.x / GROUP_THREADS - 1;
        thread = threadIdx.x % GROUP_THREADS;
        lane = thread % 32;
        warp = thread / 32;
    }

    __device__ __forceinline__ void multiply(Sums& sums, const Segment& segment) {
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) sums[i] = 0;
        for (int step = segment.sparse_begin; step < segment.sparse_end; ++step) {
            barrier_wait(shared.full + 8 * ring.stage, ring.phase);
            sparse_step(sums);
            finish_step();
        }
        for (int step = segment.dense_begin; step < segment.dense_end; ++step) {
            barrier_wait(shared.full + 8 * ring.stage, ring.phase);
            dense_step(sums);
            finish_step();
        }
    }

    __device__ __forceinline__ void sparse_step(Sums& sums) const {
        const u32 selector = lane % 4 | (4 + lane % 4) << 4;
        const u32 weight = shared.weight(ring.stage) + group * MMA_ROWS * SPARSE_ROW_BYTES;
        const u32 metadata = shared.metadata(ring.stage) + group * SPARSE_STEPS * METADATA_TILE + warp * 128 + lane / 4 * 16;
        u32 words[SPARSE_STEPS];
#pragma unroll
        for (int k = 0; k < SPARSE_STEPS; ++k) words[k] = metadata_word(metadata + k * METADATA_TILE, selector);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < SPARSE_STEPS; ++k)
            sparse_mma(
                sums, descriptor<SPARSE_SWIZZLE>(weight + k * 32),
                descriptor<SWIZZLE_128>(shared.x(ring.stage) + k / 2 * X_BOX_BYTES + k % 2 * 64), words[k]);
    }

    __device__ __forceinline__ void dense_step(Sums& sums) const {
        const u32 weight = shared.weight(ring.stage) + group * MMA_ROWS * DENSE_K;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < DENSE_STEPS; ++k)
            dense_mma(
                sums, descriptor<SWIZZLE_128>(weight + k * 32), descriptor<SWIZZLE_128>(shared.x(ring.stage) + k * 32));
    }

    // The other group is multiplying meanwhile. Until here the tensor cores may still read the metadata's registers.
    __device__ __forceinline__ void finish_step() {
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (thread == 0) barrier_arrive(shared.empty + 8 * ring.stage);
        ring.advance();
    }
};

#if OUT_FLOAT

// WIDTH quads of sums: 16 rows from `row`, 8 · WIDTH tokens from `token`.
template <int WIDTH>
__device__ __forceinline__ void write(
    const float* s, int row, int token, const Segment& segment, const Arguments& arguments, const Multiplier& me) {
    float* out = static_cast<float*>(arguments.out);
#pragma unroll
    for (int i = 0; i < 4 * WIDTH; ++i) {
        const int t = token + i / 4 * 8 + me.lane % 4 * 2 + i % 2, r = row + i % 4 / 2 * 8 + me.lane / 4;
        if (t < arguments.tokens && r < segment.row_end)
            out[u64(t) * arguments.n + segment.column + r - segment.row] = s[i];
    }
}

#else

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// WIDTH quads of sums: 16 rows from `row`, 8 · WIDTH tokens from `token`. Sums hold tokens side by side, memory wants
// rows side by side: each warp turns them in shared memory.
template <int WIDTH>
__device__ __forceinline__ void write(
    const float* s, int row, int token, const Segment& segment, const Arguments& arguments, const Multiplier& me) {
    const int lane = me.lane;
#if SCALED
    float scaled[4 * WIDTH];
#pragma unroll
    for (int i = 0; i < 4 * WIDTH; ++i) {
        const int t = token + i / 4 * 8 + lane % 4 * 2 + i % 2, r = row + i % 4 / 2 * 8 + lane / 4;
        const bool inside = t < arguments.tokens && r < segment.row_end;
        scaled[i] = inside ? s[i] * arguments.x_scale[t] * arguments.w_scale[segment.column + r - segment.row] : 0;
    }
    s = scaled;
#endif
    const u32 turn = me.shared.turn + (me.group * 4 + me.warp) * TURN_BYTES;
    // Of the 8 × 8 matrices (rows r and r + 8, of tokens t, then of tokens t + 8) each lane names one row of one.
    const u32 target = turn + (lane / 16 * 8 + lane % 8) * TURN_PITCH + lane / 8 % 2 * 16;
    __syncwarp();
    if (WIDTH == 1)
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::
            "r"(target), "r"(pack_bf16(s[0], s[1])), "r"(pack_bf16(s[2], s[3])) : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::
            "r"(target), "r"(pack_bf16(s[0], s[1])), "r"(pack_bf16(s[2], s[3])), "r"(pack_bf16(s[4], s[5])),
            "r"(pack_bf16(s[6], s[7])) : "memory");
    __syncwarp();
    const int t = token + lane / 2, r = row + lane % 2 * 8;
    if (lane < 16 * WIDTH && t < arguments.tokens && r < segment.row_end) {
        uint4 v;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
            : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
            : "r"(turn + lane / 2 * TURN_PITCH + lane % 2 * 16) : "memory");
        const u64 place = u64(t) * arguments.n + segment.column + r - segment.row;
        *reinterpret_cast<uint4*>(static_cast<byte*>(arguments.out) + place * 2) = v;
    }
}

#endif

__device__ __forceinline__ int first_row(const Segment& segment, const Multiplier& me) {
    return segment.row + me.group * MMA_ROWS + me.warp * 16;
}

__device__ __forceinline__ void write_tile(
    const Sums& sums, const Segment& segment, const Arguments& arguments, const Multiplier& me) {
    constexpr int WIDTH = QUADS < 2 ? 1 : 2;
#pragma unroll
    for (int quad = 0; quad < QUADS; quad += WIDTH)
        write<WIDTH>(&sums[4 * quad], first_row(segment, me), segment.token + 8 * quad, segment, arguments, me);
}

// Adds up the parts of a tile and writes it, slice by slice: each slice is finished by the last that has a part of it.
// Every part leaves the slices of others in memory first, and its own once those others had time to leave theirs: so
// parts that end together share the work, and with one slice the first part asks whether the others are there. Nobody
// waits longer than PATIENCE. A set of slices, or a count for each, is a number with a byte for each.
struct Joint {
    const Sums& sums;
    const Segment& segment;
    const Arguments& arguments;
    const Multiplier& me;

    static constexpr int THREADS = GROUPS * GROUP_THREADS, PART = QUADS * THREADS, SLICE_QUADS = QUADS / SLICES;
    static constexpr int PATIENCE = SLICES > 1 ? 40 : 0;   // looks at the counter, most of a microsecond each
    static constexpr u64 ALL = ~u64(0) / 255 >> 8 * (8 - SLICES);

    __device__ __forceinline__ void add_up_and_write() const {
        u64 own = 0;
        for (int slice = segment.part; slice < SLICES; slice += segment.part_count) own |= u64(1) << 8 * slice;
        u64 done = lacking_one(leave(ALL ^ own, own));
        const u64 direct = done & own;   // these need not go through memory
        if (const u64 late = own ^ direct) done |= lacking_one(leave(late, 0)) & late;
        if (threadIdx.x == GROUP_THREADS && done) atomicAdd(counter(), direct - done * segment.part_count);
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice)
            if (done >> 8 * slice & 1) finish(slice);
    }

    __device__ __forceinline__ u64* counter() const { return &arguments.arrivals[segment.tile]; }

    __device__ __forceinline__ u64 lacking_one(u64 arrived) const {
        u64 slices = 0;
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice)
            if ((arrived >> 8 * slice & 255) == segment.part_count - 1) slices |= u64(1) << 8 * slice;
        return slices;
    }

    __device__ __forceinline__ float4* place(int part, int quad) const {
        float4* parts = reinterpret_cast<float4*>(arguments.parts);
        return parts + u64(segment.first_part + part) * PART + quad * THREADS + threadIdx.x - GROUP_THREADS;
    }

    __device__ __forceinline__ float4 own_quad(int quad) const {
        const float* s = &sums[4 * quad];
        return make_float4(s[0], s[1], s[2], s[3]);
    }

    // Returns how many parts of each slice had been there; of `awaited` ones, some time later.
    __device__ __forceinline__ u64 leave(u64 slices, u64 awaited) const {
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad)
            if (slices >> 8 * (quad / SLICE_QUADS) & 1) __stcg(place(segment.part, quad), own_quad(quad));
        synchronize_groups();
        u64 arrived;
        if (threadIdx.x == GROUP_THREADS) {
            asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;"
                : "=l"(arrived) : "l"(counter()), "l"(slices) : "memory");
            for (int look = 0; look < PATIENCE && awaited & ~lacking_one(arrived); ++look) {
                u64 now;
                asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(counter()) : "memory");
                arrived = now & awaited * 255 | arrived & ~(awaited * 255);
            }
            asm volatile("st.shared.b64 [%0], %1;" ::"r"(me.shared.arrived), "l"(arrived) : "memory");
        }
        synchronize_groups();
        asm volatile("ld.shared.b64 %0, [%1];" : "=l"(arrived) : "r"(me.shared.arrived) : "memory");
        return arrived;
    }

    __device__ __forceinline__ void finish(int slice) const {
        // Loads of a thread in flight, of so many quads of so many parts: they come from far away.
        constexpr int AT_ONCE = SLICE_QUADS < 4 ? SLICE_QUADS : 4, TOGETHER = 3;
        constexpr int WIDTH = AT_ONCE < 2 ? 1 : 2;
#pragma unroll
        for (int start = slice * SLICE_QUADS; start < (slice + 1) * SLICE_QUADS; start += AT_ONCE) {
            float4 total[AT_ONCE];
            for (int first = 0; first < segment.part_count; first += TOGETHER) {
                float4 quads[TOGETHER][AT_ONCE];
#pragma unroll
                for (int i = 0; i < TOGETHER * AT_ONCE; ++i) {
                    const int part = first + i / AT_ONCE, quad = start + i % AT_ONCE;
                    float4& q = quads[i / AT_ONCE][i % AT_ONCE];
                    q = own_quad(quad);
                    if (part != segment.part && part < segment.part_count) q = __ldcg(place(part, quad));
                }
#pragma unroll
                for (int i = 0; i < TOGETHER * AT_ONCE; ++i) {
                    const int part = first + i / AT_ONCE;
                    float4 &t = total[i % AT_ONCE], &q = quads[i / AT_ONCE][i % AT_ONCE];
                    if (part < segment.part_count)
                        t = part ? make_float4(t.x + q.x, t.y + q.y, t.z + q.z, t.w + q.w) : q;
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i += WIDTH)
                write<WIDTH>(
                    &total[i].x, first_row(segment, me), segment.token + 8 * (start + i), segment, arguments, me);
        }
    }
};

// Each thread block of a cluster sums and writes some of the tile's tokens. The others send it theirs into its ring,
// which nobody needs any more: a cluster computes one tile only.
__device__ __forceinline__ void exchange_and_write(
    const Sums& sums, const Segment& segment, const Arguments& arguments, const Multiplier& me) {
    constexpr int QUAD_BYTES = GROUPS * GROUP_THREADS * 16, PART_BYTES = SHARE * QUAD_BYTES;
    const int rank = rank_in_cluster();
    const u32 mine = me.shared.stages + (threadIdx.x - GROUP_THREADS) * 16;
    synchronize_cluster();
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
        const float* s = &sums[4 * quad];
        asm volatile(
            "{\n"
            ".reg .b32 remote;\n"
            "mapa.shared::cluster.u32 remote, %0, %1;\n"
            "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n"
            "}\n" ::"r"(mine + rank * PART_BYTES + quad % SHARE * QUAD_BYTES), "r"(quad / SHARE), "f"(s[0]), "f"(s[1]),
            "f"(s[2]), "f"(s[3]) : "memory");
    }
    synchronize_cluster();
    for (int quad = 0; quad < SHARE && rank * SHARE + quad < QUADS; ++quad) {
        float total[4] = {};
#pragma unroll
        for (int from = 0; from < CLUSTER; ++from) {
            float s[4];
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                : "=f"(s[0]), "=f"(s[1]), "=f"(s[2]), "=f"(s[3]) : "r"(mine + from * PART_BYTES + quad * QUAD_BYTES)
                : "memory");
#pragma unroll
            for (int i = 0; i < 4; ++i) total[i] += s[i];
        }
        write<1>(total, first_row(segment, me), segment.token + 8 * (rank * SHARE + quad), segment, arguments, me);
    }
}

extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__((GROUPS + 1) * GROUP_THREADS, 1)
void gemm(const __grid_constant__ Arguments arguments) {
    extern __shared__ byte raw[];
    Shared shared;
    shared.stages = (shared_address(raw) + 1023) & ~1023u;
    shared.turn = shared.stages + STAGES * STAGE_BYTES;
    shared.full = shared.turn + GROUPS * 4 * TURN_BYTES;
    shared.empty = shared.full + STAGES * 8;
    shared.arrived = shared.empty + STAGES * 8;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(shared.full + 8 * stage, 1);
            barrier_init(shared.empty + 8 * stage, GROUPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const Segment* segments = arguments.segments + blockIdx.x * arguments.segments_each;
    if (threadIdx.x < GROUP_THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) Copier(arguments, shared).copy_all(segments);
        if (CLUSTER > 1) {   // as all threads of a cluster must, see exchange_and_write
            __syncwarp();
            synchronize_cluster();
            synchronize_cluster();
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wait_for_previous_kernel();
        Multiplier multiplier(shared);
        Sums sums;
        for (bool last = false; !last; ++segments) {
            const Segment segment = *segments;
            last = segment.last;
            multiplier.multiply(sums, segment);
            if (CLUSTER > 1) exchange_and_write(sums, segment, arguments, multiplier);
            else if (segment.part_count > 1) Joint{sums, segment, arguments, multiplier}.add_up_and_write();
            else write_tile(sums, segment, arguments, multiplier);
        }
    }
}
