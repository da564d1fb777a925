"""What limits 2:4 products: its kernel compiles for every kind of loop that is measured, and knows its sizes; the notes
have what was measured."""

from __future__ import annotations

import ctypes
import json
import re
from itertools import product

import pytest

pytest.importorskip("cuda.bindings", reason="needs NVIDIA's libraries")

from benchmarks.envelope import RESULTS, ROOT
from benchmarks.mma_limits import SOURCE, TILES, W_PATHS, Arguments, Kind, compiled
from vllm_spense.kernels.jit import nvrtc, sources


@pytest.mark.parametrize(("tile", "sparse"), list(product(TILES, (False, True))))
@pytest.mark.parametrize("w_path", range(len(W_PATHS)))
def test_registers_do_not_spill(tile: tuple[int, int], sparse: bool, w_path: int) -> None:
    """Or memory would be what is measured. Loading dense W ahead has not the registers for more than it does."""
    kind = Kind(*tile, sparse, w_path, 4)
    texts = {SOURCE.name: SOURCE.read_text(encoding="utf-8")} | sources.with_includes("wgmma.cuh")
    macros = [f"-D{name}={value}" for name, value in kind.macros().items()]
    options = ["--gpu-architecture=sm_90a", "--std=c++17", "--ptxas-options=-v", *macros]
    assert set(re.findall(r"(\d+) bytes spill", nvrtc.compile_program(texts, options).log)) == {"0"}


def test_every_quarter_of_the_copies_is_another_kernel() -> None:
    assert len({compiled(Kind(256, 1, True, 0, copies), "sm_90a") for copies in (4, 2, 1, 0)}) == 4


def test_a_ring_fits_into_shared_memory() -> None:
    for tile, sparse in product(TILES, (False, True)):
        kind = Kind(*tile, sparse, 0, 4)
        stages, stage = kind.macros()["STAGES"], kind.tokens * 128 + kind.rows * (64 if sparse else 128)
        # With the alignment and the barriers; one more stage would not.
        assert stages * (stage + 16) + 1024 <= 227 * 1024 < (stages + 1) * stage + 2048


def test_arguments_are_those_of_the_kernel() -> None:
    text = SOURCE.read_text(encoding="utf-8")
    body = text[text.index("struct Arguments {") :].partition("};")[0]
    names = re.findall(r"[*\s](\w+)(?:, \*(\w+))?;", body)
    assert [name for pair in names for name in pair if name] == [field[0] for field in Arguments._fields_]
    assert ctypes.sizeof(Arguments) == 6 * 8


#: How the notes call it → sparse, W's way.
WORDS = {
    "dense": (False, W_PATHS[0]),
    "2:4": (True, W_PATHS[0]),
    "2:4 in registers, never loaded": (True, W_PATHS[1]),
    "2:4 from global memory to registers": (True, W_PATHS[2]),
    "2:4 from shared memory to registers": (True, W_PATHS[3]),
}


def test_the_notes_have_the_rows_of_the_file() -> None:
    text = (ROOT / "docs/notes/kernels.md").read_text(encoding="utf-8")
    lines = re.findall(r"\| (.+), (\d+ × \d+) \| (all|none|of x) \| ([\d.]+)% \| ([\d.]+) \| ([\d.]+) \|", text)
    assert len(lines) == 8
    rows = json.loads((RESULTS / "mma_limits.json").read_text(encoding="utf-8"))["rows"]
    for name, tile, copies, *found in lines:
        wanted = *WORDS[name], tile, float(copies != "none")
        (row,) = (row for row in rows if (row["sparse"], row["w"], row["tile"], row["copied"]) == wanted)
        digits = len(found[0].partition(".")[2])
        busy = round(100 * row["of_peak"], digits)
        assert [*map(float, found)] == [busy, row["ghz"], row["speed_up"]], (name, tile, copies)
