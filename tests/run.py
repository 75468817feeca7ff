"""Runs the pytest suite on one process, then under mpirun on several, and adds up what happened.

The first run is plain pytest: it holds the doctests and the tests that start an mpirun of their own. Every
other run is `mpirun -n N` of pytest with --with-mpi. Each rank writes to a file; rank 0's is shown as it
grows and its JUnit file is counted, the others are shown when the run fails. A run that outlives its limit is
ended with all it started, and every rank prints where it stood. `2/1` are two ranks whose worlds are cut into
teams of one, as if each were a host. The last lines name every test that failed, or in which test each rank of a
run without a report stood.

    python tests/run.py --ranks 1 3 -- -k momentum      # what follows -- goes to pytest
"""

import argparse
import contextlib
import faulthandler
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

import pytest

RANK_VARIABLES = ("PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
DOCTESTS = ["--doctest-modules", "--doctest-ignore-import-errors", "extrapcomm"]
TAIL = 80  # lines of another rank's output that a failure shows
GRACE = 10  # seconds between asking and killing
WIDTH = 240  # characters of a closing line

# Reasons to skip that differ in numbers only are one line of the closing ones.
ALIKE = {
    "needs more ranks, or another number of them": "needs .*(rank|two workers)|several teams|teams whose ranks",
    "once is enough: in the run on 1 rank": "runs in the plain suite|one process (is enough|shows)",
    "works inside one team": "inside one team",
}


@dataclass(frozen=True)
class Job:
    """Ranks, and how many of them share memory; all of them if 0."""

    ranks: int
    team: int = 0

    @staticmethod
    def of(text: str) -> "Job":
        """From 4, or from 4/2: four ranks in teams of two."""
        ranks, slash, team = text.partition("/")
        if not ranks.isdecimal() or (slash and not team.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text} is neither 4 nor 4/2")
        job = Job(int(ranks), int(team) if slash else 0)
        if job.ranks < 1 or (slash and not 0 < job.team < job.ranks):
            raise argparse.ArgumentTypeError(f"{text}: at least one rank, in teams of fewer")
        return job

    def __str__(self) -> str:
        return f"{self.ranks}/{self.team}" if self.team else str(self.ranks)

    def in_words(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks} in teams of {self.team}" if self.team else ranks


@dataclass
class Outcome:
    """What one run of the suite came to."""

    job: Job
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: {"passed": 0, "failed": 0, "skipped": 0})
    skip_reasons: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main() -> int:
    options = parse_arguments()
    if options.rank_folder:
        return be_rank(options.rank_folder, options.pytest)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("run.py: told to stop"))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return report([run_suite(job, options) for job in options.ranks])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the test suite on several numbers of ranks.")
    ranks = {"type": Job.of, "nargs": "+", "default": [Job(1), Job(2), Job(2, 1), Job(3), Job(4)]}
    parser.add_argument(
        "--ranks", **ranks, help="numbers of ranks, or ranks/ranks of a team; default: 1 2 2/1 3 4"
    )
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for each number of ranks")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="files or folders of tests")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    return parser.parse_args()


# ---- one rank ----


def be_rank(folder: Path, arguments: list[str]) -> int:
    """Runs pytest in this process, whose output goes to a file from here on."""
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    faulthandler.register(signal.SIGTERM, file=log, chain=True)
    report = [f"--junitxml={folder / 'junit.xml'}", "--override-ini=junit_family=xunit1"]
    own = report if rank == "0" else ["-p", "no:cacheprovider"]
    return pytest.main([*own, *arguments], plugins=[Whereabouts(folder / f"rank-{rank}.test")])


class Whereabouts:
    """Keeps the name of the test that this rank is in, for a run that ends without a report."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.path.write_text(nodeid)

    def pytest_sessionfinish(self) -> None:
        self.path.unlink(missing_ok=True)


# ---- one run ----


def run_suite(job: Job, options: argparse.Namespace) -> Outcome:
    print(f"\n==== {job.in_words()} ====", flush=True)
    os.environ["XC_TEST_TEAM"] = str(job.team)
    with tempfile.TemporaryDirectory(prefix="extrapcomm-tests-") as name:
        folder = Path(name)
        os.environ["OMPI_MCA_btl_sm_backing_directory"] = name  # Open MPI 5 leaves a file there
        start = time.monotonic()
        code = run_bounded(command_line(job.ranks, options, folder), folder / "rank-0.log", options.limit)
        outcome = read_junit(job, folder / "junit.xml")
        outcome.seconds = time.monotonic() - start
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            outcome.counts["failed"] = max(outcome.counts["failed"], 1)
            outcome.failures += whereabouts(job, folder) or ([] if outcome.failures else [no_test(job, code)])
            show_other_ranks(folder)
    return outcome


def whereabouts(job: Job, folder: Path) -> list[str]:
    """The test in which each rank stood when it ended before its time."""
    tests = sorted(folder.glob("rank-*.test"))
    return [f"ended  on {job}: {test.stem.replace('-', ' ')} stood in {test.read_text()}" for test in tests]


def no_test(job: Job, code: int) -> str:
    return f"failed on {job}: no test of rank 0, but the run itself, with exit code {code}"


def command_line(ranks: int, options: argparse.Namespace, folder: Path) -> list[str]:
    rank = [sys.executable, __file__, "--rank-folder", str(folder), "--", *options.tests, *options.pytest]
    rank += [f"--color={'yes' if sys.stdout.isatty() else 'no'}"]
    if ranks == 1:
        return rank + (DOCTESTS if options.tests == ["tests"] else [])
    mpirun = shutil.which("mpirun") or sys.exit("run.py: no mpirun on PATH; `make test` brings one")
    return [mpirun, "-n", str(ranks), *rank, "--with-mpi"]


def run_bounded(command: list[str], log: Path, limit: float) -> int:
    """The exit code of a command whose log is shown meanwhile; past the limit it and its descendants end."""
    log.touch()
    with (
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as process,
        log.open(errors="replace") as lines,
    ):
        try:
            follow(process, lines, time.monotonic() + limit)
        except TimeoutError:
            end(process)
            show_growth(lines)
            print(f"\nrun.py: ended after {limit:.0f} s: {' '.join(command)}", flush=True)
            return 1
        except BaseException:
            end(process)
            raise
        return process.returncode


def follow(process: subprocess.Popen[bytes], lines: IO[str], deadline: float) -> None:
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError
        show_growth(lines)
        time.sleep(0.05)
    show_growth(lines)


def show_growth(lines: IO[str]) -> None:
    print(lines.read().replace("\0", ""), end="", flush=True)  # some MPI's version string ends in NUL


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks a process to end, then kills by pid what is left of it and of its descendants.

    The tree is read first: mpirun puts its ranks into groups and sessions of their own, where a signal to one
    group would miss them, and orphans would be nobody's descendants.
    """
    family = [process.pid, *descendants(process.pid)]
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            after_name = stat.read_text().rpartition(")")[2].split()
            children[int(after_name[1])].append(int(stat.parent.name))
    found = list(children[pid])
    for child in found:
        found += children[child]
    return found


def show_other_ranks(folder: Path) -> None:
    for log in sorted(folder.glob("rank-[1-9]*.log")):
        lines = log.read_text(errors="replace").splitlines()
        tail = lines[-TAIL:]
        print(f"\n---- {log.stem.replace('-', ' ')}, the last {len(tail)} of {len(lines)} lines ----")
        print("\n".join(tail), flush=True)


# ---- all runs ----


def read_junit(job: Job, path: Path) -> Outcome:
    """Counts rank 0's tests; a file that was never written counts as nothing."""
    outcome = Outcome(job)
    if not path.exists():
        return outcome
    for case in ElementTree.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome.counts["failed" if failed else "passed" if skipped is None else "skipped"] += 1
        if skipped is not None:
            outcome.skip_reasons.append(skip_reason(skipped))
        if failed:
            outcome.failures.append(f"failed on {job}: {name_of(case)}: {first_line(case)}"[:WIDTH])
    return outcome


def skip_reason(skipped: ElementTree.Element) -> str:
    reason = skipped.get("message", "no reason given")
    if skipped.get("type") == "pytest.xfail":
        return f"expected failure: {reason}"
    return next((common for common, pattern in ALIKE.items() if re.search(pattern, reason)), reason)


def name_of(case: ElementTree.Element) -> str:
    return f"{case.get('file', case.get('classname'))}::{case.get('name')}"


def first_line(case: ElementTree.Element) -> str:
    """Of the message with which a test failed; and the next one, which says where, if that was on another rank."""
    failures = [found for found in (case.find("failure"), case.find("error")) if found is not None]
    lines = failures[0].get("message", "").splitlines() or ["no message"]
    return " ".join(lines[: 2 if "failed elsewhere" in lines[0] else 1])


def report(outcomes: list[Outcome]) -> int:
    print("\nranks  passed  failed  skipped  seconds")
    for outcome in outcomes:
        passed, failed, skipped = outcome.counts.values()
        print(f"{outcome.job!s:>5}  {passed:6}  {failed:6}  {skipped:7}  {outcome.seconds:7.1f}")
    report_skips(outcomes)
    for outcome in outcomes:
        print("".join(f"{line}\n" for line in outcome.failures), end="")
    total = {name: sum(outcome.counts[name] for outcome in outcomes) for name in outcomes[0].counts}
    print("\n" + ", ".join(f"{number} {name}" for name, number in total.items()))
    return int(total["failed"] > 0 or total["passed"] == 0)


def report_skips(outcomes: list[Outcome]) -> None:
    """One line for each reason: how many tests it skipped, and in which runs."""
    skips: dict[str, list[Job]] = defaultdict(list)
    for outcome in outcomes:
        for reason in outcome.skip_reasons:
            skips[reason].append(outcome.job)
    for reason, jobs in sorted(skips.items()):
        print(f"skipped {len(jobs):4} on {', '.join(map(str, dict.fromkeys(jobs)))}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
