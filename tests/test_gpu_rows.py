"""The programs of `make test-gpu` are right, as far as a machine without a GPU can tell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMM

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "tests" / "gpu"

pytestmark = pytest.mark.skipif(COMM.size > 1, reason="starts its own processes; runs in the plain suite")
torch = pytest.importorskip("torch")


@pytest.fixture
def run(monkeypatch):
    """The module that makes the table."""
    monkeypatch.syspath_prepend(str(ROWS))
    monkeypatch.setattr(sys, "argv", ["run.py", "--installed"])
    import run

    return run


def program(command, **environment):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=100, env=os.environ | environment
    )


@pytest.mark.parametrize(
    ("row", "figure"),
    [
        (["bits.py", "--fast"], "combinations, bit for bit"),
        (["capture.py"], "6 replays of SGD, ExtrapSGD, Adam, ExtrapAdam"),
        (["processes.py", "event"], "5 steps of 2 processes, the bits of one"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_row_passes_on_the_hosts_own_device(row, figure):
    done = program([ROWS / row[0], *row[1:]], XC_DEVICE="host")
    assert done.returncode == 0, done.stderr
    assert figure in done.stdout.splitlines()[-1]


def test_row_without_a_gpu_says_so():
    done = program([ROWS / "bits.py"], CUDA_VISIBLE_DEVICES="", XC_DEVICE="")
    assert (done.returncode, done.stdout) == (77, "skipped: torch sees no GPU\n")


def test_benchmark_without_a_gpu_says_so():
    done = program([ROOT / "benchmarks" / "step.py", "--device", "cuda"], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "--device cuda: torch sees no GPU here; run it on a machine that has one" in done.stderr


@pytest.mark.parametrize(
    ("text", "result", "figure"),
    [
        ("print('warming up'); print('3 GB/s')", "passed", "3 GB/s"),
        ("import sys; print('skipped: no tool'); sys.exit(77)", "skipped", "no tool"),
        ("raise SystemExit('it broke')", "FAILED", "it broke"),
        ("import time; time.sleep(60)", "FAILED", "ended after 2 s"),
    ],
    ids=["passed", "skipped", "failed", "late"],
)
def test_row_ends_as_its_program_does(run, tmp_path, text, result, figure):
    script = tmp_path / "row.py"
    script.write_text(text)
    outcome = run.run(run.Row("a row", (str(script),), 2.0), run.time.monotonic() + 30)
    assert (outcome.result, outcome.figure) == (result, figure)


def test_row_past_the_limit_of_all_is_left_out(run):
    outcome = run.run(run.ROWS[0], run.time.monotonic())
    assert (outcome.result, outcome.figure) == ("skipped", "the 600 s for everything are over")


def test_table_gives_result_device_figure_and_command_of_each_row(run, capsys):
    run.print_table(
        [
            run.Outcome("bits", "passed", "7 of 7", "python tests/gpu/bits.py"),
            run.Outcome("CuPy", "skipped", "no cupy", "python tests/gpu/cupy_arrays.py"),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["row", "result", "device", "figure", "command"]
    assert "7 of 7" in lines[2] and lines[2].endswith("python tests/gpu/bits.py")
    assert "skipped: no cupy" in lines[3]
    assert lines[-1] == "GPU rows: 1 passed, 0 failed, 1 skipped"
