// Which output tiles there are, from the experts' numbers of tokens, and in which order: integer arithmetic alone, so that
// the compiler can work it out for a test without a GPU. tiles.py is its twin.
//
// A tile is TILE_ROWS rows of one expert's W × up to TILE_TOKENS of its tokens. Tiles that read the same rows are neighbours:
// they run at the same time on different multiprocessors, and W comes from memory once.
#pragma once
#include "ptx.cuh"

#define DEVICE_CONSTEXPR __device__ __forceinline__ constexpr

// Rows of W that are computed in the same way, the same in every expert. Output split: one band for each region; input
// split: one for all rows.
struct Band {
    int rows, row_tiles;
    int column;                      // of the output, of its first row
    int sparse_steps, dense_steps;   // steps of K, sparse ones first
};

struct Tile {
    int expert;
    int row, row_end;                // in the band: its first row; one past the band's last
    int column;                      // of its first row in the output
    int token, token_end;            // rows of x and of the output
    int width;                       // tokens of a tensor core instruction: 8 · 2^index, no less than there are
    int index;
    int sparse_steps, dense_steps;
    bool shared;                     // other tiles read the same W
};

// How many tiles the tokens of an expert are divided into.
DEVICE_CONSTEXPR int token_tiles(int tokens, int max_tokens) { return (tokens + max_tokens - 1) / max_tokens; }

// Where everything stands in the order of all tiles: bands, in each the experts, in each its rows, and for each its
// tokens.
template <int TILE_TOKENS, int TILE_ROWS>
struct Order {
    const int* offsets;   // (experts + 1): the first token of each expert, and one past the last
    const int* first;     // (experts + 1): how many tiles of tokens the experts before have
    int experts;
    const Band* bands;    // two; a band that is not there has no row_tiles

    DEVICE_CONSTEXPR int count() const { return first[experts] * (bands[0].row_tiles + bands[1].row_tiles); }

    // Tile number `position` < count().
    DEVICE_CONSTEXPR Tile tile(int position) const {
        const int before = first[experts] * bands[0].row_tiles;
        const int place = position < before ? position : position - before;
        const Band& band = bands[position < before ? 0 : 1];
        const int expert = expert_of(place / band.row_tiles);
        const int rest = place - first[expert] * band.row_tiles, tiles = first[expert + 1] - first[expert];
        const int row = rest / tiles * TILE_ROWS, token = offsets[expert] + rest % tiles * TILE_TOKENS;
        const int token_end = offsets[expert + 1] < token + TILE_TOKENS ? offsets[expert + 1] : token + TILE_TOKENS;
        int index = 0;
        while (8 << index < token_end - token) ++index;
        return {expert, row, band.rows, band.column + row, token, token_end, 8 << index, index,
                band.sparse_steps, band.dense_steps, tiles > 1};
    }

    // The expert that tile `number` of tokens belongs to; experts without tokens have none.
    DEVICE_CONSTEXPR int expert_of(int number) const {
        int low = 0, high = experts;   // first[low] <= number < first[high]
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (first[middle] <= number) low = middle;
            else high = middle;
        }
        return low;
    }
};
