"""Measure processes: CPU seconds, wall seconds and peak resident size, of one thread each.

Nothing here imports torch, nor may a script that calls ``measure``: the kernel counts what the parent holds at the time
of the fork into the peak of the child.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_POLL = 0.01
"""Seconds between two looks at a running process."""


class Failed(Exception):
    """A measured process ended with an error; the message is the last line that it wrote."""


@dataclass(frozen=True)
class Cost:
    """What a process took.

    Args:
        cpu: Seconds, of user and system together, of its children, too.
        wall: Seconds.
        peak: Peak resident size in bytes, pages of mapped files included.
        anonymous: Peak of what of it is not backed by a file, in bytes, looked at every 10 ms; 0 where unknown.
        said: The JSON object that its last line holds, if it holds one.
    """

    cpu: float
    wall: float
    peak: float
    anonymous: float
    said: Mapping[str, Any] = field(default_factory=dict)

    def __sub__(self, other: Cost) -> Cost:
        """What this process took beyond another one."""
        mine, theirs = self.numbers(), other.numbers()
        return Cost(*(a - b for a, b in zip(mine, theirs, strict=True)), said=self.said)

    def numbers(self) -> tuple[float, float, float, float]:
        """The four measurements."""
        return self.cpu, self.wall, self.peak, self.anonymous


def python(*arguments: Any, interpreter: str = sys.executable) -> list[str]:
    """The command that runs ``python ARGUMENTS``."""
    return [interpreter, *map(str, arguments)]


def measure(command: Sequence[str], threads: int = 1) -> Cost:
    """Run a command and say what it took.

    Args:
        command: Run in a temporary folder, with this checkout on the Python path.
        threads: For OpenMP and the BLAS libraries.

    Raises:
        Failed: If the process did not end well, or cannot be started.
    """
    environment = os.environ | dict.fromkeys(THREADS, str(threads)) | {"PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        try:
            child = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        except OSError as error:
            raise Failed(str(error)) from error
        status, usage, anonymous = _wait(child)
        wall = time.perf_counter() - start
        out.seek(0)
        lines = out.read().decode(errors="replace").strip().splitlines() or [""]
    if status != 0:
        raise Failed(f"killed by signal {-status}" if status < 0 else lines[-1])
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * unit, anonymous, _said(lines[-1]))


def _wait(child: subprocess.Popen[bytes]) -> tuple[int, Any, int]:
    """Wait for the end of a process: its exit status, its resource usage, its largest anonymous memory in bytes."""
    anonymous = 0
    try:
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                child.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it again
                return child.returncode, usage, anonymous
            anonymous = max(anonymous, _anonymous(child.pid))
            time.sleep(_POLL)
    except BaseException:
        child.kill()
        raise


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _said(line: str) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def measure_all(commands: Mapping[str, Sequence[str]], repeat: int = 1) -> dict[str, Cost | Failed]:
    """Measure several commands in turns, so that a busy minute falls on all of them; medians over the repetitions."""
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    failed: dict[str, Failed] = {}
    for _ in range(repeat):
        for name, command in commands.items():
            if name in failed:
                continue
            try:
                costs[name].append(measure(command))
            except Failed as error:
                failed[name] = error
    return {name: failed.get(name) or _median(costs[name]) for name in commands}


def _median(costs: Sequence[Cost]) -> Cost:
    numbers = zip(*(cost.numbers() for cost in costs), strict=True)
    keys = costs[-1].said
    said = {key: median(cost.said[key] for cost in costs) for key in keys if isinstance(keys[key], (int, float))}
    return Cost(*map(median, numbers), said={**keys, **said})


def machine(*notes: str) -> str:
    """One line on the machine, the versions and the day."""
    packages = []
    for package in ("torch", "safetensors", "lightning"):
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    busy = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    parts = [_processor(), f"{os.cpu_count()} cores", "1 thread", *packages, f"Python {platform.python_version()}"]
    return ", ".join([*parts, busy, str(date.today()), *notes])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; the keys of all rows are its head, floats get three digits."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines = [head, ["---"] * len(head), *([_cell(row.get(key, "")) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def say(text: str) -> None:
    """Write to the standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
