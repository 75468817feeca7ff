"""`make test-gpu`: builds the package, runs what needs a GPU row by row, and prints one table.

Needed: nvcc, cmake, a C++ compiler, and a Python with torch, numpy and pybind11; neither a virtual environment nor MPI
nor a network. Each row is a process of its own with its own limit, and all together end within ten minutes. A row that
cannot run says why. The exit status is 0 if no row failed.

    python tests/gpu/run.py                what `make test-gpu` does
    python tests/gpu/run.py --installed    with the extrapcomm that this Python has, instead of building one
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "gpu"
ALL = 600.0  # seconds for everything
SKIPPED = 77  # how a row says that it cannot run here
PASSED, FAILED, LEFT_OUT = "passed", "FAILED", "skipped"
MODULES = {"torch": "torch", "numpy": "numpy", "pybind11": "pybind11"}


@dataclass(frozen=True)
class Row:
    """A program in this folder, its arguments, and its seconds."""

    name: str
    words: tuple[str, ...]
    limit: float

    @property
    def command(self) -> str:
        return " ".join(("python", f"tests/gpu/{self.words[0]}", *self.words[1:]))


ROWS = (
    Row("bits of the CPU", ("bits.py",), 200),
    Row("streams", ("streams.py",), 60),
    Row("capture and replay", ("capture.py",), 60),
    Row("2 processes, events", ("processes.py", "event"), 120),
    Row("2 processes, spinning", ("processes.py", "spin"), 120),
    Row("2 processes, streams' own waits", ("processes.py", "memop"), 120),
    Row("a rank that is absent", ("processes.py", "absent"), 60),
    Row("a GPU that is late", ("processes.py", "late"), 120),
    Row("the same, streams' own waits", ("processes.py", "late-memop"), 120),
    Row("memcheck", ("sanitized.py", "memcheck"), 150),
    Row("racecheck", ("sanitized.py", "racecheck"), 150),
    Row("CuPy", ("cupy_arrays.py",), 60),
    Row("NCCL", ("nccl.py",), 30),
    Row("benchmark", ("speed.py",), 120),
)


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str
    figure: str
    command: str
    output: str = ""


def main() -> int:
    options = parse_arguments()
    deadline = time.monotonic() + ALL
    outcomes = []
    if not options.installed:
        outcomes.append(build(deadline))
        show(outcomes[-1])
    reason = why_no_row(outcomes)
    for row in ROWS:
        outcomes.append(Outcome(row.name, LEFT_OUT, reason, row.command) if reason else run(row, deadline))
        show(outcomes[-1])
    print_table(outcomes)
    return int(any(outcome.result == FAILED for outcome in outcomes))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What needs a GPU, row by row, in one table.")
    parser.add_argument(
        "--installed", action="store_true", help="build nothing; take the installed extrapcomm"
    )
    return parser.parse_args()


# ---- the package ----


def build(deadline: float) -> Outcome:
    """Both modules by CMake, beside a copy of the package's Python files."""
    command = f"cmake -S . -B {BUILD.relative_to(ROOT)}/cmake; cmake --build ..."
    if missing := what_is_missing():
        return Outcome("build", LEFT_OUT, missing, command)
    since = time.monotonic()
    package = BUILD / "extrapcomm"
    shutil.copytree(
        ROOT / "extrapcomm", package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for step in (configuration(package), compilation()):
        code, output = run_bounded(step, max(1.0, deadline - time.monotonic()))
        if code:
            return Outcome("build", FAILED, f"cmake ended with {code}", command, output)
    return Outcome("build", PASSED, f"{time.monotonic() - since:.0f} s for {architectures_here()}", command)


def what_is_missing() -> str:
    for program, remedy in (
        ("cmake", "pip install cmake"),
        ("nvcc", "install CUDA's toolkit, or put it on PATH"),
    ):
        if not shutil.which(program):
            return f"no {program} on PATH ({remedy})"
    for name, package in MODULES.items():
        if find_spec(name) is None:
            return f"{sys.executable} has no {name} (pip install {package})"
    return ""


def configuration(package: Path) -> list[str]:
    import pybind11

    ninja = shutil.which("ninja")
    return [
        *("cmake", "-S", str(ROOT), "-B", str(BUILD / "cmake")),
        *(["-G", "Ninja"] if ninja else []),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DXC_CUDA=ON",
        f"-DXC_CUDA_ARCHITECTURES={architectures_here()}",
    ]


@cache
def architectures_here() -> str:
    """Those of the GPUs that are seen, so that the build is short; one that shows that it compiles if there is none."""
    capabilities = [word.replace(".", "") for word in ask_driver("compute_cap")]
    return ";".join(sorted({f"{word}-real" for word in capabilities if word.isdigit()})) or "90-real"


def ask_driver(what: str) -> list[str]:
    """What the driver tells of each GPU; nothing without one."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    seen = subprocess.run(query, capture_output=True, text=True, check=False)
    return seen.stdout.strip().splitlines() if seen.returncode == 0 else []


def compilation() -> list[str]:
    command = ["cmake", "--build", str(BUILD / "cmake"), "--target", "_core", "_cuda"]
    return [*command, "--parallel", str(os.cpu_count() or 1)]


def why_no_row(outcomes: list[Outcome]) -> str:
    """What keeps all rows from running, or nothing."""
    if outcomes and outcomes[0].result != PASSED:
        return "there is no build"
    look = "import torch; from extrapcomm.device import has_cuda_part; print(has_cuda_part())"
    code, output = run_bounded([sys.executable, "-c", look], 120.0)
    if code:
        return f"extrapcomm or torch cannot be imported: {last_line(output)}"
    return "extrapcomm was built without its CUDA part" if last_line(output) == "False" else ""


# ---- a row ----


def run(row: Row, deadline: float) -> Outcome:
    limit = min(row.limit, deadline - time.monotonic())
    if limit < 1:
        return Outcome(row.name, LEFT_OUT, f"the {ALL:.0f} s for everything are over", row.command)
    command = [sys.executable, str(HERE / row.words[0]), *row.words[1:]]
    code, output = run_bounded(command, limit)
    figure = last_line(output).removeprefix("skipped: ")
    if code == 0:
        return Outcome(row.name, PASSED, figure, row.command, output)
    if code == SKIPPED:
        return Outcome(row.name, LEFT_OUT, figure, row.command)
    return Outcome(
        row.name, FAILED, figure if code > 0 else f"ended after {limit:.0f} s", row.command, output
    )


def run_bounded(command: list[str], limit: float) -> tuple[int, str]:
    """The exit code and the output; past the limit the process and its descendants end, and the code is -1."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(python_path())}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            end(process)
        log.seek(0)
        return code, log.read()


def python_path() -> list[str]:
    before = os.environ.get("PYTHONPATH")
    built = [str(BUILD)] if "--installed" not in sys.argv else []
    return [*built, *([before] if before else [])]


def end(process: subprocess.Popen[bytes]) -> None:
    """The group that this process leads, and nothing else."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


# ---- the table ----


def show(outcome: Outcome) -> None:
    """While it runs: what each row said, if there is more to it than its figure."""
    print(f"{outcome.name}: {outcome.result}", flush=True)
    if outcome.result == FAILED or outcome.name == "benchmark":
        print(outcome.output, flush=True)


def print_table(outcomes: list[Outcome]) -> None:
    rows = [("row", "result", "device", "figure", "command"), *map(cells, outcomes)]
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    count = {result: sum(o.result == result for o in outcomes) for result in (PASSED, FAILED, LEFT_OUT)}
    print(f"\nGPU rows: {count[PASSED]} passed, {count[FAILED]} failed, {count[LEFT_OUT]} skipped")


def cells(outcome: Outcome) -> tuple[str, ...]:
    skipped = outcome.result == LEFT_OUT
    result = f"skipped: {outcome.figure}" if skipped else outcome.result
    return outcome.name, result, device(), "-" if skipped else outcome.figure, outcome.command


@cache
def device() -> str:
    """The GPUs' names, as the driver tells them."""
    names = ask_driver("name")
    return f"{len(names)} x {names[0]}" if len(names) > 1 else (names or ["none"])[0]


if __name__ == "__main__":
    sys.exit(main())
