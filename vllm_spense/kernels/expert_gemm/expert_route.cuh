// What the kernels around the experts' GEMMs share: which expert of this rank a token has chosen.
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
