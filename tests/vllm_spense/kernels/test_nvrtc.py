"""Every CUDA kernel compiles, without a GPU, for every architecture that it is for: without spills, in few registers.
And Python knows its sizes and arguments."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from vllm_spense.kernels.elementwise import norm_quant, scale, silu_mul_quant
from vllm_spense.kernels.elementwise.silu_mul_quant import Way
from vllm_spense.kernels.expert_gemm import instances as experts
from vllm_spense.kernels.expert_gemm import routing
from vllm_spense.kernels.jit import nvrtc, sources
from vllm_spense.kernels.one_launch import instances
from vllm_spense.kernels.one_launch.schedule import DENSE_K, FIELDS, ROWS, Tiling
from vllm_spense.kernels.region_gemm.packing import TILE, TILE_BYTES

BF16, FLOAT = torch.bfloat16, torch.float32
HOPPER, BLACKWELL = ("sm_90a",), ("sm_100a", "sm_120a")
#: GEMMs that searches try: every tile, the ways to cut it, the kinds of outputs; the largest of each.
GEMMS = [
    *((Tiling(tokens, 256), BF16, False) for tokens in (8, 16, 32, 64, 128)),
    (Tiling(256, 128), BF16, False),
    (Tiling(32, 128, 3), BF16, False),
    (Tiling(128, 256, 3), BF16, False),
    (Tiling(256, 128, 4), BF16, False),
    (Tiling(8, 256, 8, cluster=True), BF16, False),
    (Tiling(64, 256, 3, cluster=True), BF16, False),
    (Tiling(256, 128, 2, cluster=True), BF16, False),
    (Tiling(128, 128, 2), BF16, True),
    (Tiling(256, 128, 3), FLOAT, False),
]
#: The experts' GEMMs: every way to cut them, few experts and many.
EXPERT_GEMMS = [
    (experts.Tiling(tokens, sparse_k), count)
    for tokens, sparse_k, count in (
        (64, 256, 8), (64, 256, 512), (128, 256, 128), (256, 128, 128), (256, 128, 512),
    )
]  # fmt: skip
#: Source, macros, architectures, most registers of a thread. A GEMM may have what its launch bounds allow; the others,
#: a tenth more than was found.
KERNELS: list[tuple[str, Mapping[str, int], tuple[str, ...], int]] = [
    *(("one_launch.cu", instances.macros(dtype, scaled, tiling), HOPPER, 168) for tiling, dtype, scaled in GEMMS),
    *(
        # Up to 64 tokens half of the registers, so that other launches' thread blocks find room.
        ("expert_gemm.cu", experts.macros(tiling, count), HOPPER, 80 if tiling.tokens <= 64 else 168)
        for tiling, count in EXPERT_GEMMS
    ),
    *(
        ("expert_route.cu", routing.route_macros(size, top_k, count, ranked), ("sm_89", *HOPPER, *BLACKWELL), 128)
        for size, top_k, count, ranked in (
            (64, 2, 8, False),
            (2048, 8, 128, False),
            (7168, 16, 512, False),
            (4096, 16, 512, True),
        )
    ),
    ("expert_ranks.cu", routing.rank_macros(16, 512), ("sm_89", *HOPPER, *BLACKWELL), 64),
    *(
        ("expert_sum.cu", routing.sum_macros(top_k), ("sm_89", *HOPPER, *BLACKWELL), registers)
        for top_k, registers in ((8, 128), (16, 185))
    ),
    ("scale.cu", scale.MACROS, ("sm_89", *HOPPER, *BLACKWELL), 40),
    *(
        ("norm_quant.cu", norm_quant.macros(size, norm, scaled), ("sm_89", *HOPPER, *BLACKWELL), registers)
        for size, norm, scaled, registers in (
            (64, True, True, 61),
            (5120, False, False, 30),
            (5120, True, False, 40),
            (5120, True, True, 53),
            (18432, True, True, 82),
        )
    ),
    *(
        ("silu_mul_quant.cu", silu_mul_quant.macros(size, way, raw_float, scaled), (*HOPPER, *BLACKWELL), registers)
        for size, way, raw_float, scaled, registers in (
            (64, Way(1), False, True, 47),
            (25600, Way(4, hold=True), False, True, 70),
            (25600, Way(2, threads=1024, hold=True), False, True, 70),
            (28672, Way(1, threads=1024), False, True, 78),
            (14336, Way(1, threads=512), False, True, 78),
            (8192, Way(8, tokens=2), True, True, 79),
            (34816, Way(8, tokens=2), True, True, 121),
            (768, Way(1), False, False, 44),
            (768, Way(1, tokens=2), False, False, 44),
            (768, Way(1, tokens=2), True, True, 77),
            (2048, Way(1), True, True, 44),
        )
    ),
]
#: C++'s offsetof, which NVRTC has not in every version.
OFFSET = "#define OFFSET(type, field) __INTADDR__(&static_cast<type*>(nullptr)->field)"
CASES = [(name, macros, arch, most) for name, macros, archs, most in KERNELS for arch in archs]


@pytest.fixture(scope="module")
def compiled() -> Iterator[list[Future[nvrtc.Compiled]]]:
    """Of every case; threads make them."""
    with ThreadPoolExecutor() as pool:
        yield [
            pool.submit(nvrtc.compile_file, name, arch, macros, "--ptxas-options=-v") for name, macros, arch, _ in CASES
        ]
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=[f"{n}-{a}-{'-'.join(map(str, m.values()))}" for n, m, a, _ in CASES]
)
def test_it_compiles_in_few_registers(case: int, compiled: list[Future[nvrtc.Compiled]]) -> None:
    cubin, log = compiled[case].result()
    assert cubin.startswith(b"\x7fELF")
    for pattern, most in (
        (r"(\d+) bytes spill stores", 0),
        (r"(\d+) bytes spill loads", 0),
        (r"Used (\d+) registers", CASES[case][3]),
    ):
        # Of each function of the file.
        assert max(map(int, re.findall(pattern, log))) <= most, log


def test_no_kernel_is_forgotten() -> None:
    assert {name for name, *_ in KERNELS} == {name for name in sources._sources() if name.endswith(".cu")}
    assert all(instances.fits(tiling) for tiling, *_ in GEMMS)


def require(name: str, macros: Mapping[str, int], facts: Mapping[str, int]) -> None:
    """That the compiler agrees with these facts about a CUDA file."""
    asserts = (f'static_assert({what} == {value}, "{what} is not {value}");' for what, value in facts.items())
    text = "\n".join((f'#include "{name}"', OFFSET, *asserts, "__global__ void nothing() {}"))
    options = ["--gpu-architecture=sm_90a", "--std=c++17", *(f"-D{macro}={value}" for macro, value in macros.items())]
    nvrtc.compile_program({"facts.cu": text, **sources.with_includes(name)}, options)


def layout(structure: type[ctypes.Structure]) -> dict[str, int]:
    facts = {"sizeof(Arguments)": ctypes.sizeof(structure)}
    for name, *_ in structure._fields_:
        facts[f"OFFSET(Arguments, {name})"] = getattr(structure, name).offset
    return facts


@pytest.mark.parametrize(("tiling", "dtype", "scaled"), GEMMS, ids=str)
def test_python_and_the_gemm_agree(tiling: Tiling, dtype: torch.dtype, scaled: bool) -> None:
    facts = {
        "THREADS": instances.THREADS,
        "ROWS": ROWS,
        "DENSE_K": DENSE_K,
        "MMA_ROWS": TILE,
        "METADATA_TILE_BYTES": TILE_BYTES,
        "SHARED_BYTES": instances.stages(tiling)[1],
        "sizeof(Segment)": 4 * len(FIELDS),
    }
    named = [field for field in FIELDS if field != "unused"]
    facts |= {f"OFFSET(Segment, {field})": 4 * place for place, field in enumerate(named)}
    macros = instances.macros(dtype, scaled, tiling)
    require("one_launch.cuh", macros, facts | layout(instances.Arguments))


@pytest.mark.parametrize(("tiling", "count"), EXPERT_GEMMS, ids=str)
def test_python_and_the_gemm_of_experts_agree(tiling: experts.Tiling, count: int) -> None:
    assert experts.stages(tiling, count)[0] >= 4
    facts = {
        "THREADS": experts.THREADS,
        "ROWS": experts.ROWS,
        "DENSE_K": experts.DENSE_K,
        "MMA_ROWS": TILE,
        "METADATA_TILE_BYTES": TILE_BYTES,
        "WIDTHS": len(experts.WIDTHS),
        "SHARED_BYTES": experts.stages(tiling, count)[1],
        "sizeof(Band)": ctypes.sizeof(experts.Band),
        **{f"OFFSET(Band, {name})": getattr(experts.Band, name).offset for name, _ in experts.Band._fields_},
        **layout(experts.Arguments),
    }
    require("expert_gemm.cuh", experts.macros(tiling, count), facts)


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("expert_route", routing.RouteArguments),
        ("expert_ranks", routing.RankArguments),
        ("expert_sum", routing.SumArguments),
    ],
)
def test_python_and_the_routing_of_experts_agree(name: str, structure: type[ctypes.Structure]) -> None:
    sizes = {"expert_ranks": {"CHUNK": routing.CHUNK}, "expert_route": {"CHUNK": routing.CHUNK, "WIDTH": routing.WIDTH}}
    require(f"{name}.cu", {}, {**sizes.get(name, {"WIDTH": routing.WIDTH}), **layout(structure)})


@pytest.mark.parametrize("module", [norm_quant, silu_mul_quant, scale], ids=lambda module: module.__name__)
def test_python_and_an_elementwise_kernel_agree(module) -> None:
    name = module.__name__.rpartition(".")[2]
    require(f"{name}.cu", {}, {"WIDTH": module.WIDTH, **layout(module.Arguments)})


def test_a_wrong_fact_is_found() -> None:
    for what, value in (("THREADS", 256), ("sizeof(Arguments)", 512), ("OFFSET(Arguments, partials)", 512)):
        with pytest.raises(RuntimeError, match=re.escape(f"{what} is not {value}")):
            require("one_launch.cuh", {}, {what: value})


def test_a_changed_header_is_another_program(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """What was compiled is kept under a name that every included file counts for."""
    monkeypatch.setenv("SPENSE_CACHE_DIR", str(tmp_path))
    first = nvrtc.cubin("scale.cu", "sm_90a", scale.MACROS)
    assert nvrtc.cubin("scale.cu", "sm_90a", scale.MACROS) == first
    assert len(list(tmp_path.iterdir())) == 1
    texts = dict(sources._sources())
    assert list(sources.with_includes("scale.cu")) == ["scale.cu", "elementwise.cuh", "ptx.cuh"]
    monkeypatch.setattr(sources, "_sources", lambda: texts | {"ptx.cuh": texts["ptx.cuh"] + "\n"})
    nvrtc.cubin("scale.cu", "sm_90a", scale.MACROS)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_log_is_not_written_over_what_python_shares() -> None:
    """Python has one object for each single byte, and NVRTC writes into the bytes that it is given."""
    space = bytes([0x20])
    source = 'extern "C" __global__ void empty() {}'
    assert nvrtc.compile_program({"empty.cu": source}, ["--gpu-architecture=sm_90a"]).log == ""
    assert (space[0], (b" " * 3)[0]) == (0x20, 0x20)
