"""Hardware features are detected, and every choice comes with its reason."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from stillhouse import cgroups, cpu_products, hardware
from tests.clocks import Clock
from tests.forks import result_of


def describe_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str) -> None:
    file = tmp_path / "cpuinfo"
    other = "processor : 1\nmodel name : other\nflags : nothing\n"
    file.write_text(
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: Toy CPU: 3 GHz\n"
        f"flags\t\t: {flags}\n\n{other}",
        "utf-8",
    )
    monkeypatch.setattr(hardware, "CPU_INFO", file)


def test_flags_and_name_come_from_the_first_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    describe_cpu(monkeypatch, tmp_path, "fpu avx2 avx512_bf16 sse")
    assert hardware.cpu_abilities() == {"avx2", "avx512_bf16"}
    machine = hardware.machine()
    assert machine["cpu"] == "Toy CPU: 3 GHz"
    assert (machine["cpu_family"], machine["cpu_model"]) == ("25", "17")


def test_torch_is_queried_if_there_is_no_cpuinfo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "absent")
    answer = {"avx2": True, "avx512_f": True, "avx512_bf16": False, "cpu_name": "x"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: answer, raising=False)
    assert hardware.cpu_abilities() == {"avx2", "avx512f"}


@pytest.mark.parametrize(
    ("flags", "dtype", "reason"),
    [
        ("avx2 avx512f avx512_bf16", torch.bfloat16, "this CPU supports avx512_bf16"),
        ("avx2 amx_tile amx_bf16", torch.bfloat16, "this CPU supports amx_bf16"),
        ("avx2 avx512f", torch.float32, "neither AVX512-BF16 nor AMX"),
    ],
)
def test_auto_uses_bfloat16_only_if_the_cpu_supports_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flags: str,
    dtype: torch.dtype,
    reason: str,
) -> None:
    describe_cpu(monkeypatch, tmp_path, flags)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    precision = hardware.choose_precision("auto", "cpu")
    assert precision.dtype == dtype
    assert reason in precision.reason


@pytest.mark.parametrize(
    ("limit", "dtype"),
    [("avx2", torch.float32), ("AVX512_CORE_VNNI", torch.float32), ("DEFAULT", torch.bfloat16)],
)
def test_auto_obeys_the_limit_of_onednn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, dtype: torch.dtype
) -> None:
    describe_cpu(monkeypatch, tmp_path, "avx2 avx512f avx512_bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    precision = hardware.choose_precision("auto", "cpu")
    assert precision.dtype == dtype
    assert (f"ONEDNN_MAX_CPU_ISA={limit}" in precision.reason) == (dtype == torch.float32)


def test_a_requested_precision_is_used_and_its_cost_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    describe_cpu(monkeypatch, tmp_path, "avx2")
    asked = hardware.choose_precision("bfloat16", "cpu")
    assert asked.dtype == torch.bfloat16
    assert "slow here" in asked.reason
    assert hardware.choose_precision("float32", "cpu").dtype == torch.float32


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_native_bfloat16_support_is_queried_from_the_gpu(
    monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Toy GPU")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation
    )
    precision = hardware.choose_precision("auto", "cuda")
    assert precision.dtype == dtype
    assert "Toy GPU" in precision.reason


def page_faults(mode: str) -> int:
    if mode != "plain":
        hardware.tune_allocator()
    if mode == "handed back":
        hardware.hand_back_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


PAGES_OF_TWENTY_TENSORS = 20 * (64 << 20) // 4096


@pytest.mark.run
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_the_tuned_allocator_reuses_freed_memory() -> None:
    faults = result_of(page_faults, "plain") - result_of(page_faults, "tuned")
    assert faults > PAGES_OF_TWENTY_TENSORS / 2


@pytest.mark.run
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_handed_back_even_after_the_allocator_was_tuned() -> None:
    faults = result_of(page_faults, "handed back") - result_of(page_faults, "tuned")
    assert faults > PAGES_OF_TWENTY_TENSORS / 2


def resident() -> int:
    return psutil.Process().memory_info().rss


def delete_tensors_and_free_memory() -> tuple[int, int]:
    hardware.tune_allocator()
    kept, passing = [], []
    for _ in range(64):
        passing.append(torch.ones(1 << 20))
        kept.append(torch.ones(1 << 10))  # so that the heap cannot shrink from its end
    peak = resident()
    del passing
    before = resident()
    hardware.free_memory()
    return peak - before, peak - resident()


@pytest.mark.run
@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_memory_of_a_stage_is_freed_before_the_next_begins() -> None:
    """256 MiB of deleted tensors stay resident until the heap is trimmed."""
    before, after = result_of(delete_tensors_and_free_memory)
    assert before < 128 << 20 < after


def leave_gaps_and_check_the_heap() -> int:
    hardware.tune_allocator()
    heap, passing, kept = hardware.HeapLimit(), [], []
    heap.check()
    for _ in range(64):
        passing.append(torch.ones(1 << 20))
        kept.append(torch.ones(1 << 10))  # so that gaps remain between these
    del passing
    before = resident()
    heap.check()
    return before - resident()


@pytest.mark.run
@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_gaps_on_the_heap_are_returned_between_steps() -> None:
    assert result_of(leave_gaps_and_check_the_heap) > 128 << 20


def test_the_heap_is_trimmed_once_memory_has_grown_by_a_quarter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a trim, the memory of the next step is the new baseline, since it allocates again."""
    trims: list[int] = []

    class Library:
        @staticmethod
        def malloc_trim(padding: int) -> None:
            trims.append(padding)

    taken = iter([1000, 1200, 1320, 900, 1100, 1200])  # MiB
    monkeypatch.setattr(hardware, "_has_glibc", lambda: True)
    monkeypatch.setattr(hardware, "_anonymous_bytes", lambda: next(taken) << 20)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    heap = hardware.HeapLimit()
    found = []
    for _ in range(6):
        heap.check()
        found.append(len(trims))
    assert found == [0, 0, 1, 1, 1, 2]


def test_one_process_that_works_for_all_uses_every_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun gives each process one thread."""
    threads = [1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr(cgroups, "OWN_CGROUPS", Path("missing"))
    monkeypatch.setattr(psutil, "cpu_count", lambda *, logical: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for processes in (1, 4):
        with hardware.cores_of(processes):
            pass
    assert threads == [1, 8, 1, 2, 1]
    threads[:] = [4]  # as with OMP_NUM_THREADS=4
    with hardware.cores_of(4):
        assert threads[-1] == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with hardware.cores_of(1):
        assert threads[-1] == 4


def test_the_allocator_is_unchanged_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)  # calling it would be an error
    hardware.tune_allocator()
    hardware.hand_back_freed_memory()


def test_matmul_rate_is_the_speed_of_a_real_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances as if each product ran at 1e9 FLOP/s."""
    clock, product = Clock(), cpu_products.product

    def timed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        clock.now += 2 * left.shape[0] * left.shape[1] * right.shape[0] / 1e9
        return product(left, right)

    monkeypatch.setattr(hardware, "time", clock)
    monkeypatch.setattr(hardware, "product", timed)
    assert hardware.matmul_rate(torch.float32) == pytest.approx(1e9)


def free_512_mib() -> int:
    before = hardware.peak_memory_bytes()
    torch.ones(128 << 20)
    return hardware.peak_memory_bytes() - before


@pytest.mark.run
def test_peak_memory_is_in_bytes_and_remembers_what_was_freed() -> None:
    assert result_of(free_512_mib) == pytest.approx(512 << 20, rel=0.2)


def free_512_mib_and_reset_the_peak() -> int:
    torch.ones(128 << 20)
    before = hardware.peak_memory_bytes()
    hardware.free_memory()
    hardware.reset_peak_memory()
    return before - hardware.peak_memory_bytes()


@pytest.mark.run
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_peak_memory_can_be_reset() -> None:
    assert result_of(free_512_mib_and_reset_the_peak) == pytest.approx(512 << 20, rel=0.2)


@pytest.mark.run
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS cannot tell the two apart")
def test_peak_memory_does_not_start_at_that_of_the_parent() -> None:
    held = torch.ones(256 << 20)  # 1 GiB here must not hide the child's growth
    script = "from tests.test_hardware import free_512_mib; print(free_512_mib())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(512 << 20, rel=0.2)
    assert held.numel() == 256 << 20


def test_the_description_of_the_machine_is_plain_json() -> None:
    described = hardware.machine()
    assert json.loads(json.dumps(described)) == described
    assert described["torch_threads"] == torch.get_num_threads()


def test_the_default_device_exists() -> None:
    torch.ones(1, device=hardware.default_device())


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_respects_the_limit_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """The innermost limit counts, and cached pages of files count as free."""
    root = tmp_path if version == 2 else tmp_path / "memory"
    job = root / "slurm" / "job 7"
    job.mkdir(parents=True)
    line = "0::/slurm/job 7" if version == 2 else "4:cpu,memory:/slurm/job 7"
    (tmp_path / "own").write_text(f"9:cpuset:/\n{line}\n")
    monkeypatch.setattr(cgroups, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
    whole = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: whole)
    assert hardware.free_memory_bytes("cpu") == 10_000
    names, total = ("memory.max", "memory.current"), ""
    if version == 1:
        names, total = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
    for folder, limit in ((job, "5000"), (job.parent, "max" if version == 2 else "8000")):
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text("3000\n")
        (folder / "memory.stat").write_text(
            f"anon 2000\n{total}inactive_file 700\n{total}active_file 300\n"
        )
    assert hardware.free_memory_bytes("cpu") == 5000 - 2000


@pytest.mark.parametrize("version", [1, 2])
def test_threads_respect_the_core_limit_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """In a container, Linux reports all cores of the machine."""
    folder = (tmp_path if version == 2 else tmp_path / "cpu") / "docker"
    folder.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/docker\n" if version == 2 else "3:cpu,cpuacct:/docker\n")
    monkeypatch.setattr(cgroups, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
    monkeypatch.setattr(psutil, "cpu_count", lambda *, logical: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(128), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = [64]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def limit(cores: float | None) -> None:
        quota = None if cores is None else round(cores * 100_000)
        if version == 2:
            (folder / "cpu.max").write_text(f"{quota or 'max'} 100000\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{quota or -1}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")

    for cores, expected in ((None, 64), (4.5, 4), (0.5, 1)):
        limit(cores)
        assert hardware.usable_cores() == expected
        with hardware.cores_of(1):
            assert threads[-1] == expected
        assert threads[-1] == 64
    limit(None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4})
    assert hardware.usable_cores() == 2
