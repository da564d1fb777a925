"""CUDA C++ at run time: NVRTC compiles, on any machine. Nothing is compiled at installation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cuda.bindings import nvrtc

from vllm_spense.kernels.jit.sources import digest, with_includes
from vllm_spense.kernels.tuning.plan_cache import load_or_make_bytes


class Compiled(NamedTuple):
    """Machine code, and what the compiler said about it."""

    cubin: bytes
    log: str


def cubin(name: str, arch: str, macros: Mapping[str, int]) -> bytes:
    """Machine code of the CUDA file `name` of this package; compiled once, then kept beside the plans.

    Args:
        arch: the GPU's architecture: "sm_90a".
        macros: what the file is specialized with.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    sources = with_includes(name)
    options = _options(arch, macros)
    version = _checked(nvrtc.nvrtcVersion())
    key = digest(*sources, *sources.values(), *options, str(version))
    return load_or_make_bytes(f"{key}.cubin", lambda: compile_program(sources, options).cubin)


def compile_file(name: str, arch: str, macros: Mapping[str, int], *options: str) -> Compiled:
    """As `cubin`, but always compiled, with further options for the compiler."""
    return compile_program(with_includes(name), [*_options(arch, macros), *options])


def compile_program(sources: Mapping[str, str], options: Sequence[str]) -> Compiled:
    """Compiles the first of `sources`, which may include the others.

    Args:
        sources: texts by file name.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    (name, text), *headers = ((name.encode(), text.encode()) for name, text in sources.items())
    header_names, header_texts = ([header[i] for header in headers] for i in (0, 1))
    program = _checked(nvrtc.nvrtcCreateProgram(text, name, len(headers), header_texts, header_names))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        messages = _filled(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if status.value:
            raise RuntimeError(f"NVRTC: {messages}")
        return Compiled(_filled(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), messages)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _filled(size_of: Callable[..., Any], fill: Callable[..., Any], program: Any) -> bytes:
    """What NVRTC writes into a bytes object that it is given."""
    size = _checked(size_of(program))
    # Python has one object for each single byte: NVRTC would write over the one that everybody shares.
    if size < 2:
        return b""
    written = bytes(size)
    _checked(fill(program, written))
    return written


def _options(arch: str, macros: Mapping[str, int]) -> list[str]:
    return [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{macro}={value}" for macro, value in macros.items())]


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status.value:
        raise RuntimeError(f"NVRTC: {status!r}")
    return values[0] if len(values) == 1 else values
