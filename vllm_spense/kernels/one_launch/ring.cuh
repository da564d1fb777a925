// What kernels share that read W through a ring in shared memory: whose turn a stage is, and a thread's metadata.
#pragma once
#include "ptx.cuh"

// The stage that comes next, and the parity of the barriers' phase in this round of the
// ring of COUNT stages.
template <int COUNT>
struct PipelineState {
    int stage = 0;
    u32 phase = 0;

    DEVICE void advance() {
        if (++stage == COUNT) stage = 0, phase ^= 1;
    }
};

// A thread's share of a metadata tile: the bytes of four neighbouring threads lie interleaved.
DEVICE u32 metadata_selector(int lane) { return lane % 4 | (4 + lane % 4) << 4; }

DEVICE u32 metadata_word(u32 address, u32 selector) {
    const uint4 v = ld_shared_u32x4(address);
    return __byte_perm(__byte_perm(v.x, v.y, selector), __byte_perm(v.z, v.w, selector), 0x5410);
}
