"""The machine that figures were made on: two kinds of CPU differ by a factor of three, so every figure names it."""

import os
import platform
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.version import VERSION

# What decides the speed and the exact bits of torch on a CPU.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "fma")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "numpy", "pyarrow")


@cache
def machine_info() -> dict[str, Any]:
    """This machine, as plain JSON values: cpu, flags, cores, memory_gib, gpus, system, python, versions."""
    cpu_info = _fields(Path("/proc/cpuinfo"))
    flags = cpu_info.get("flags", "").split()
    memory_kib = _fields(Path("/proc/meminfo")).get("MemTotal", "0 kB").split()[0]
    return {
        "cpu": cpu_info.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(int(memory_kib) / 2**20, 1),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {"ddpo-ray": VERSION} | {name: found for name in PACKAGES if (found := _version(name))},
    }


def describe(machine: dict[str, Any]) -> str:
    """One line, such as "AMD EPYC, 2 cores (avx2, fma), 24 GiB"."""
    flags = f" ({', '.join(machine['flags'])})" if machine.get("flags") else ""
    parts = [str(machine.get("cpu", "unknown CPU")), f"{machine.get('cores', '?')} cores{flags}"]
    parts += [f"{machine['memory_gib']:g} GiB"] if machine.get("memory_gib") else []
    return ", ".join(parts + list(machine.get("gpus", [])))


def _fields(path: Path) -> dict[str, str]:
    """The first value of each "key : value" line; none where there is no such file (other systems than Linux)."""
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _gpus() -> list[str]:
    """Names and memory, from the driver's own tool: importing torch for this takes seconds."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", check=False)
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
