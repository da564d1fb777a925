"""Which thread block of the one-launch kernel computes what: a pure function, made once for a problem and M.

A tile is `ROWS` rows of W × some tokens of the output, over all of its columns. Its columns are steps: sparse ones
first, then dense ones. There are two ways to occupy the multiprocessors:

- tiles go whole to the thread blocks as far as that comes out even, and the rest is cut so that it does (many tiles);
- every tile is cut into the same number of splits (few tiles), which may form a cluster.

Splits are summed by all thread blocks of a cluster, or by whichever of the tile's finish last. Nobody depends on work
that may not have begun, so that launches of several streams never block each other.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from vllm_spense.kernels.region_gemm.problem import Problem

#: Of W in a tile, and columns of a dense step, as in one_launch.cuh.
ROWS, DENSE_K = 128, 128
#: int32 fields of a segment, as in one_launch.cuh.
FIELDS = (
    "projection", "row", "row_end", "column", "token", "sparse_begin", "sparse_end", "dense_begin", "dense_end",
    "split", "split_count", "first_partial", "semaphore", "last", "unused", "unused",
)  # fmt: skip
#: Cost of a byte from or to the cache, against one from memory.
_CACHE = 0.25
#: A thread block may get this much more than its share before a tile is cut.
_SLACK = 1.02


@dataclass(frozen=True)
class Tiling:
    """How a GEMM is cut.

    Attributes:
        tokens: of a tile, a power of two from 8 to 256.
        sparse_k: columns of a sparse step, 128 or 256.
        splits: of every tile; 0 leaves that to `schedule`.
        cluster: the splits of a tile form a cluster, which adds them up through shared memory.
    """

    tokens: int
    sparse_k: int
    splits: int = 0
    cluster: bool = False

    @property
    def cluster_size(self) -> int:
        return self.splits if self.cluster else 1

    @property
    def slices(self) -> int:
        """That a tile's splits are added up in, each by another of them: worth it for large tiles whose splits end
        together."""
        return 4 if self.splits and not self.cluster and self.tokens >= 128 else 1

    @property
    def sparse_cost(self) -> float:
        """Of a sparse step, in bytes from memory: 0.625 a weight, and x from the cache."""
        return self.sparse_k * (0.625 * ROWS + _CACHE * self.tokens)

    @property
    def dense_cost(self) -> float:
        return DENSE_K * (ROWS + _CACHE * self.tokens)

    @property
    def split_cost(self) -> float:
        """Of writing or reading a split's float32 sums."""
        return 4 * _CACHE * ROWS * self.tokens

    def cost(self, tile: Tile) -> float:
        return tile.sparse_steps * self.sparse_cost + tile.dense_steps * self.dense_cost


@dataclass(frozen=True)
class Tile:
    """Where it lies in W (first row in its projection's region, one past the region's last) and in the output."""

    projection: int
    row: int
    row_end: int
    column: int
    token: int
    sparse_steps: int
    dense_steps: int

    @property
    def steps(self) -> int:
        return self.sparse_steps + self.dense_steps


#: For a thread block without work.
_NOTHING = Tile(0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Piece:
    """Steps [begin, end) of a tile, counted over both regions; `tile` is its number among those that are cut."""

    tile: int
    begin: int
    end: int


@dataclass(frozen=True)
class Division:
    """Who does what: for each thread block its whole tiles and its pieces of `cut` tiles.

    Attributes:
        cost: of the busiest thread block.
    """

    whole: Sequence[Sequence[Tile]]
    cut: Sequence[Tile]
    pieces: Sequence[Sequence[Piece]]
    cost: float


@dataclass(frozen=True)
class Schedule:
    """Tables for the kernel.

    Attributes:
        segments: int32 (thread blocks, most segments of one, len(FIELDS)), in the order of execution.
        partials: how many times ROWS × tokens float32 sums need room.
        semaphores: how many tiles have several splits that form no cluster.
    """

    segments: np.ndarray
    partials: int
    semaphores: int


def schedule(problem: Problem, tokens: int, tiling: Tiling, multiprocessors: int) -> Schedule:
    """Divides a GEMM with M = `tokens` among all multiprocessors."""
    work = list(tiles(problem, tokens, tiling))
    if tiling.splits:
        pieces = [[piece] for number, tile in enumerate(work) for piece in _share(number, tile, tiling)]
        return _tables(Division([[] for _ in pieces], work, pieces, 0))
    rounds = 1 + int(sum(map(tiling.cost, work)) / multiprocessors / max(map(tiling.cost, work)))
    division = min(
        (divide(work, tiling, multiprocessors, held) for held in range(min(rounds, 3))), key=lambda d: d.cost
    )
    return _tables(division)


def tiles(problem: Problem, tokens: int, tiling: Tiling) -> Iterator[Tile]:
    """Every tile of the output; neighbours share their rows of W."""
    sparse, dense = problem.regions.sparse, problem.regions.dense
    sparse_steps, dense_steps = -(-problem.sparse_shape[1] // tiling.sparse_k), -(-problem.dense_shape[1] // DENSE_K)
    if problem.split == "output":
        # The longer tiles first: the shorter ones then level what they leave.
        regions = [(sparse, dense, 0, dense_steps), (0, sparse, sparse_steps, 0)]
    else:
        regions = [(0, problem.n, sparse_steps, dense_steps)]
    for begin, rows, sparse_count, dense_count in regions:
        for projection in range(problem.projections):
            first = projection * problem.n // problem.projections + begin
            for row in range(0, rows, ROWS):
                for token in range(0, tokens, tiling.tokens):
                    yield Tile(projection, row, rows, first + row, token, sparse_count, dense_count)


def divide(work: Sequence[Tile], tiling: Tiling, blocks: int, held: int) -> Division:
    """Whole tiles in turn to the least busy thread block, up to a fair share less `held` tiles each; cuts the rest."""
    fair = sum(map(tiling.cost, work)) / blocks
    loads = [(0.0, block) for block in range(blocks)]
    whole: list[list[Tile]] = [[] for _ in range(blocks)]
    cut = []
    for tile in work:
        load, block = loads[0]
        if load + (held + 1) * tiling.cost(tile) > _SLACK * fair:
            cut.append(tile)
        else:
            heapq.heapreplace(loads, (load + tiling.cost(tile), block))
            whole[block].append(tile)
    if not cut:
        return Division(whole, cut, [[] for _ in whole], max(loads)[0])

    rest = sum(map(tiling.cost, cut))
    # More splits make a tile's columns faster and its sum slower; the optimum of a / splits + b · splits.
    splits = max(1, round(sqrt(rest / len(cut) / tiling.split_cost)))
    helpers = min(blocks, len(cut) * splits)
    room = np.zeros(blocks)
    if helpers < blocks:
        room[[block for _, block in sorted(loads)[:helpers]]] = rest / helpers
    else:
        for load, block in loads:
            room[block] = max(fair - load, 0)
    pieces = _cut(cut, tiling, room)
    counts = Counter(piece.tile for mine in pieces for piece in mine)
    joining = tiling.split_cost * (1 + max(counts.values())) if max(counts.values()) > 1 else 0
    return Division(whole, cut, pieces, max(load + room[block] for load, block in loads) + joining)


def _borders(cut: Sequence[Tile], tiling: Tiling, room: np.ndarray) -> np.ndarray:
    """Lays the steps of tiles end to end: where each piece ends if their costs are to be as `room` (pieces,) says."""
    costs = np.concatenate(
        [np.repeat([tiling.sparse_cost, tiling.dense_cost], [tile.sparse_steps, tile.dense_steps]) for tile in cut]
    )
    ends = np.cumsum(costs)
    borders = np.searchsorted(ends, np.cumsum(room) / room.sum() * ends[-1] - costs.min() / 2)
    borders[-1] = len(costs)
    return borders


def _share(number: int, tile: Tile, tiling: Tiling) -> Iterator[Piece]:
    """A tile's equal splits, some of them empty if it has fewer steps."""
    begin = 0
    for end in _borders([tile], tiling, np.ones(tiling.splits)).tolist():
        yield Piece(number, begin, end)
        begin = end


def _cut(cut: Sequence[Tile], tiling: Tiling, room: np.ndarray) -> list[list[Piece]]:
    """The pieces of each thread block, in proportion to its room."""
    borders = _borders(cut, tiling, room)
    pieces: list[list[Piece]] = [[] for _ in room]
    block = begin = start = 0
    for number, tile in enumerate(cut):
        stop = start + tile.steps
        while begin < stop:
            while borders[block] <= begin:
                block += 1
            end = min(stop, int(borders[block]))
            pieces[block].append(Piece(number, begin - start, end - start))
            begin = end
        start = stop
    return pieces


def _tables(division: Division) -> Schedule:
    counts = Counter(piece.tile for mine in division.pieces for piece in mine)
    assert max(counts.values(), default=0) < 256, "the kernel counts splits in bytes"
    shared = [tile for tile, count in sorted(counts.items()) if count > 1]
    semaphore = {tile: index for index, tile in enumerate(shared)}
    starts = np.cumsum([0, *(counts[tile] for tile in shared)])
    done: Counter[int] = Counter()
    lines = []
    for whole, pieces in zip(division.whole, division.pieces, strict=True):
        line = []
        # Pieces first: sums of others can then be added while whole tiles still keep the memory busy.
        for piece in pieces:
            index = semaphore.get(piece.tile, 0)
            split = (done[piece.tile], counts[piece.tile], int(starts[index]), index)
            line.append(_segment(division.cut[piece.tile], piece.begin, piece.end, split))
            done[piece.tile] += 1
        line += [_segment(tile, 0, tile.steps, (0, 1, 0, 0)) for tile in whole]
        lines.append(line or [_segment(_NOTHING, 0, 0, (0, 1, 0, 0))])
    segments = np.zeros((len(lines), max(map(len, lines)), len(FIELDS)), np.int32)
    for row, line in zip(segments, lines, strict=True):
        row[: len(line)] = line
        row[len(line) - 1, FIELDS.index("last")] = 1
    return Schedule(segments, int(starts[-1]), len(shared))


def _segment(tile: Tile, begin: int, end: int, split: tuple[int, int, int, int]) -> tuple[int, ...]:
    """
    Args:
        split: its number, how many the tile has, where their partial sums lie, the tile's semaphore.
    """
    sparse = tile.sparse_steps
    return (
        tile.projection, tile.row, tile.row_end, tile.column, tile.token, min(begin, sparse), min(end, sparse),
        max(begin - sparse, 0), max(end - sparse, 0), *split, 0, 0, 0,
    )  # fmt: skip
