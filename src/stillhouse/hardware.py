"""This machine's capabilities, all measured or read from it except its power draw."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from stillhouse import cgroups
from stillhouse.cpu_products import product
from stillhouse.launch import local_index, processes_here

Requested = Literal["auto", "float32", "bfloat16"]

CPU_INFO = Path("/proc/cpuinfo")
PROCESS_STATUS = Path("/proc/self/status")
PROCESS_PAGES = Path("/proc/self/statm")
PEAK_RESET = Path("/proc/self/clear_refs")
ABILITIES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
"""Instruction sets that determine how fast a CPU multiplies matrices, by their Linux names."""

WATTS_A_CORE = 10.0

HEAP_GROWTH, HEAP_SLACK = 1.25, 64 << 20
"""`HeapLimit` allows HEAP_GROWTH times the memory after the first step, plus HEAP_SLACK bytes."""

ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that restrict which instruction sets oneDNN uses."""
WITHOUT_BFLOAT16 = frozenset(
    ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
)
"""Values of `ONEDNN_LIMITS` below AVX512-BF16 and AMX."""

_TORCH_NAMES = {"avx512f": "avx512_f"}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # <malloc.h> of glibc
_MAPPINGS = 1 << 16  # glibc's default
_MATMUL_SECONDS = 0.6


@dataclass(frozen=True)
class Precision:
    """The dtype of matrix products, and the reason for choosing it, as text for the user."""

    dtype: torch.dtype
    reason: str


def default_device() -> torch.device:
    """This process's CUDA GPU (the first GPU without torchrun), or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_index())


def device_kind(device: torch.device) -> str:
    """Describe what must be the same in all processes of a torchrun: the GPU and its memory, or a
    CPU's default precision."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)} with {memory / 2**30:.0f} GiB"
    dtype = choose_precision("auto", device).dtype
    return f"a {device.type.upper()} for {str(dtype).removeprefix('torch.')}"


@contextmanager
def cores_of(processes: int) -> Iterator[None]:
    """Use this process's share of the cores inside the block, with so many torchrun processes.

    torchrun gives each process one thread; if the user asked for more threads than the share, they
    are kept. A single process uses the number of threads that torch chose, up to the number of
    cores of its container.
    """
    before = torch.get_num_threads()
    if processes_here() > 1:
        torch.set_num_threads(max(before, usable_cores() // processes))
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min([before, *cgroups.cores()]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_cores() -> int:
    """The number of physical cores, or fewer if this process's affinity or container allows
    fewer."""
    found = [psutil.cpu_count(logical=False) or 1, *cgroups.cores()]
    if hasattr(os, "sched_getaffinity"):  # Slurm sets the affinity; macOS has none
        found.append(len(os.sched_getaffinity(0)))
    return min(found)


def cpu_abilities() -> frozenset[str]:
    """The `ABILITIES` of this CPU: from /proc/cpuinfo on Linux, otherwise from torch."""
    flags = _cpu_info().get("flags", "").split()
    if flags:
        return frozenset(flags).intersection(ABILITIES)
    ask_torch = getattr(torch.cpu, "get_capabilities", None)  # not in older versions of torch
    capabilities: dict[str, object] = ask_torch() if ask_torch else {}
    return frozenset(
        name for name in ABILITIES if capabilities.get(_TORCH_NAMES.get(name, name), False)
    )


def choose_precision(requested: Requested, device: torch.device | str | None = None) -> Precision:
    """Choose bfloat16 if the device multiplies it natively, otherwise float32; an explicit request
    is obeyed. device: None means the default device.

    On a CPU, native bfloat16 means AVX512-BF16 or AMX, used through oneDNN. Without them, bfloat16
    products are emulated and slower than float32.
    """
    device = default_device() if device is None else torch.device(device)
    native, why = _native_bfloat16(device)
    if requested == "float32":
        return Precision(torch.float32, "float32, as requested")
    if requested == "bfloat16":
        caution = "" if native else f"; slow here: {why}"
        return Precision(torch.bfloat16, f"bfloat16, as requested{caution}")
    if native:
        return Precision(torch.bfloat16, f"bfloat16: {why}")
    return Precision(torch.float32, f"float32: {why}")


def tune_allocator() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel after each tensor.

    A training step allocates and frees the same large blocks again and again; by default, each is a
    new mapping whose pages the kernel must zero. Call this before the first large allocation.
    """
    _set_malloc(mapped_from=1 << 30, trimmed_from=2**31 - 1)


def free_memory() -> None:
    """Collect garbage, including reference cycles, and return the free parts of the heap and the
    GPU cache, so that other processes can use the memory."""
    gc.collect()
    return_gaps()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def return_gaps() -> None:
    """Return the free parts of the heap to the kernel, for example before a phase whose tensors
    have different sizes and would not fit into them. Takes some milliseconds."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def hand_back_freed_memory() -> None:
    """Undo `tune_allocator`, for work that should use little memory.

    From then on, blocks of 1 MiB or more are separate mappings. On the heap, a block in use would
    retain everything freed below it, which can add up to more than all memory in use. Free memory
    between smaller blocks is returned once per call.
    """
    _set_malloc(mapped_from=1 << 20, trimmed_from=1 << 20)
    return_gaps()


class HeapLimit:
    """Limits how much memory a loop wastes whose tensors vary in size.

    Such tensors leave gaps on the heap that later tensors do not fit into. `tune_allocator` keeps
    the gaps, so the process grows with every step although it uses no more memory.
    """

    def __init__(self) -> None:
        self._trims, self._usual = _has_glibc(), 0

    def check(self) -> None:
        """Return the gaps to the kernel once memory has grown by a quarter. Call this between
        steps, after a step's tensors have been freed; it takes some microseconds."""
        if not self._trims:
            return
        taken = _anonymous_bytes()
        if not self._usual:
            self._usual = taken
        elif taken > HEAP_GROWTH * self._usual + HEAP_SLACK:
            return_gaps()
            self._usual = 0  # the next step allocates its tensors again


def _anonymous_bytes() -> int:
    """This process's resident memory that is not backed by files."""
    resident, shared = map(int, PROCESS_PAGES.read_text(encoding="ascii").split()[1:3])
    return (resident - shared) * mmap.PAGESIZE


def _has_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def _set_malloc(*, mapped_from: int, trimmed_from: int) -> None:
    """Set glibc's thresholds for allocating a mapping and for returning free memory."""
    if not _has_glibc():
        return
    libc = ctypes.CDLL(None)
    libc.mallopt.argtypes, libc.mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    libc.mallopt(_M_MMAP_MAX, _MAPPINGS)
    # Some versions of glibc cap the threshold; allowing no mappings has the same effect.
    if not libc.mallopt(_M_MMAP_THRESHOLD, mapped_from):
        libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, trimmed_from)


def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Measure the FLOP/s of a large square product in `dtype`: the median of several, in under a
    second.

    A product of two [n, n] matrices counts 2n³ FLOPs. The result, for as many threads as torch
    uses, is the practical ceiling that training throughput is compared with.
    """
    device = torch.device(device)
    side = 8192 if device.type == "cuda" else 512
    while True:
        matrix = torch.randn(side, side, device=device).to(dtype)
        _timed_product(matrix)
        seconds = _timed_product(matrix)
        if seconds > _MATMUL_SECONDS / 20 or side >= 16384:
            break
        side *= 2
    repeats = max(1, min(7, int(_MATMUL_SECONDS / seconds)))
    median = statistics.median(_timed_product(matrix) for _ in range(repeats))
    return 2.0 * side**3 / median


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished its work, so that timings are correct."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def free_memory_bytes(device: torch.device | str) -> int:
    """The device's memory, in bytes, that this process could still allocate."""
    device = torch.device(device)
    if device.type != "cuda":
        return max(0, min([psutil.virtual_memory().available, *cgroups.memory_left()]))
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def reset_peak_memory() -> None:
    """Reset the peak to the current memory if the system can do that (Linux).

    For benchmarks only: tools that measure the process from outside lose its earlier peak, too.
    """
    with suppress(OSError):
        PEAK_RESET.write_text("5", encoding="ascii")  # proc(5), clear_refs


def peak_memory_bytes() -> int:
    """This process's peak resident memory in bytes since `reset_peak_memory`, without GPU memory.

    Mapped pages of files, such as a checkpoint's, count while they are resident. On Linux, this is
    VmHWM in /proc/self/status, because getrusage's ru_maxrss starts at the peak of the process that
    started this one. macOS has only ru_maxrss, in bytes.
    """
    if PROCESS_STATUS.is_file():
        for line in PROCESS_STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def assumed_watts() -> float:
    """Estimate this machine's power under load: the GPUs' power limits, or 10 W per CPU core."""
    if torch.cuda.is_available():
        command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
            return sum(float(line) for line in found.stdout.split())
    return WATTS_A_CORE * (psutil.cpu_count(logical=False) or 1)


def machine() -> dict[str, Any]:
    """Describe this machine for manifests and benchmark results, as JSON values; memory in
    bytes."""
    cpu = _cpu_info()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        # Virtual machines often hide the model's name.
        "cpu_family": cpu.get("cpu family"),
        "cpu_model": cpu.get("model"),
        "architecture": platform.machine(),
        "system": platform.system(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(logical=True),
        "cpu_abilities": sorted(cpu_abilities()),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _native_bfloat16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, f"{name} supports it natively"
        return False, f"{name} does not support it natively"
    if device.type != "cpu":
        return False, f"support for bfloat16 is not checked on a {device.type} device"
    has = cpu_abilities()
    found = [name for name in ("amx_bf16", "avx512_bf16") if name in has]
    if not found:
        return False, "this CPU has neither AVX512-BF16 nor AMX"
    if not torch.backends.mkldnn.is_available():
        return False, "this build of torch has no oneDNN, which bfloat16 products need"
    for name in ONEDNN_LIMITS:
        limit = os.environ.get(name, "")
        if limit.upper() in WITHOUT_BFLOAT16:
            return False, f"{name}={limit} limits oneDNN to instructions without bfloat16"
    return True, f"this CPU supports {found[0]}"


def _timed_product(matrix: torch.Tensor) -> float:
    synchronize(matrix.device)
    started = time.perf_counter()
    product(matrix, matrix.T)
    synchronize(matrix.device)
    return time.perf_counter() - started


def _cpu_info() -> dict[str, str]:
    """The first processor's block in /proc/cpuinfo; empty if there is no such file."""
    if not CPU_INFO.is_file():
        return {}
    first = CPU_INFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
