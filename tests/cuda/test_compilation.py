"""Every kernel compiles, on machines without a GPU too: by NVRTC from its wheel."""

import ctypes
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, files

import pytest

from raygraft.kernels.cuda.sources import OPTIONS, all_sources

SOURCES = all_sources()
ARCHITECTURES = ("compute_80", "sm_90")


@pytest.fixture(scope="module")
def nvrtc() -> ctypes.CDLL:
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            found = files(package) or []
        except PackageNotFoundError:
            continue
        for file in found:
            if file.name.startswith("libnvrtc.so"):
                return ctypes.CDLL(str(file.locate()))
    pytest.skip("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")


def compile_errors(nvrtc: ctypes.CDLL, source: str, architecture: str) -> str:
    """The compiler's messages; empty when it has none. Warnings count."""
    program = ctypes.c_void_p()
    assert not nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"source.cu", 0, None, None
    )
    options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={architecture}")]
    code = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*options)
    )
    size = ctypes.c_size_t()
    assert not nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    assert not nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode().strip()
    return text or (f"error {code}" if code else "")


@pytest.fixture(scope="module")
def compiling(nvrtc: ctypes.CDLL) -> Iterator[dict[tuple[str, str], Future[str]]]:
    """What is said to each source and architecture, two at a time, the longest first."""
    both = [(name, architecture) for name in SOURCES for architecture in ARCHITECTURES]
    both.sort(key=lambda one: "attention" not in one[0])
    with ThreadPoolExecutor(2) as pool:
        yield {(n, a): pool.submit(compile_errors, nvrtc, SOURCES[n], a) for n, a in both}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SOURCES)
def test_kernels_compile(compiling, name, architecture):
    assert compiling[name, architecture].result() == ""


def test_a_mistake_is_seen(nvrtc):
    assert "undefined" in compile_errors(nvrtc, 'extern "C" __global__ void k() { x; }', "sm_90")
