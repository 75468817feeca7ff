"""What the benchmarks print and write: rank 0's table in nccl-tests' manner, and the JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
from problem import Problem
from rivals import dtype_name

OWN = ("fused", "memcpy")


@dataclass(frozen=True)
class Result:
    """One size: the seconds of every iteration, and the wrong elements, by contestant."""

    problem: Problem
    seconds: dict[str, np.ndarray]
    wrong: dict[str, int] | None  # None: nobody looked

    def microseconds(self, contestant: str) -> float | None:
        if contestant not in self.seconds:
            return None
        return 1e6 * float(np.median(self.seconds[contestant]))

    def percentile(self, of: float) -> float:
        """A percentile of the fused step's time, in microseconds."""
        return 1e6 * float(np.percentile(self.seconds["fused"], of))

    def gigabytes_per_second(self, size: float, contestant: str = "fused") -> float:
        return size / float(np.median(self.seconds[contestant])) / 1e9

    @property
    def floor(self) -> float:
        return self.gigabytes_per_second(self.problem.floor_bytes)

    @property
    def memcpy(self) -> float:
        return self.gigabytes_per_second(self.problem.floor_bytes, "memcpy")

    @property
    def algbw(self) -> float:
        return self.gigabytes_per_second(self.problem.gradient_bytes)

    @property
    def busbw(self) -> float:
        k = self.problem.all_workers
        return self.algbw * 2 * (k - 1) / k

    @property
    def nwrong(self) -> int | None:
        return None if self.wrong is None else sum(self.wrong.values())

    def ratio(self, rival: str) -> float | None:
        if rival not in self.seconds:
            return None
        return float(np.median(self.seconds[rival]) / np.median(self.seconds["fused"]))

    def tails(self) -> dict[str, float]:
        return {f"p{of}_us": self.percentile(of) for of in (95, 99)}

    def as_json(self) -> dict[str, Any]:
        return {
            "count": self.problem.count,
            "fused": {"time_us": self.microseconds("fused"), **self.tails(), "floor_gbps": self.floor},
            "memcpy_gbps": self.memcpy,
            "baselines": {
                rival: {"time_us": self.microseconds(rival)} for rival in self.seconds if rival not in OWN
            },
            "nwrong": self.nwrong,
        }


@dataclass(frozen=True)
class Column:
    title: str
    unit: str
    width: int
    cell: Callable[[Any], str]


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def step_columns(rivals: Sequence[str]) -> list[Column]:
    def against(rival: str) -> Column:
        return Column(rival, "(x fused)", max(10, len(rival)), lambda r: number(r.ratio(rival)))

    return [
        Column("size", "(B)", 11, lambda r: str(r.problem.gradient_bytes)),
        Column("count", "(elements)", 11, lambda r: str(r.problem.count)),
        Column("type", "", 8, lambda r: dtype_name(r.problem.dtype)),
        Column("time", "(us)", 9, lambda r: number(r.microseconds("fused"), 1)),
        Column("p95", "(us)", 9, lambda r: number(r.percentile(95), 1)),
        Column("p99", "(us)", 9, lambda r: number(r.percentile(99), 1)),
        Column("floor", "(GB/s)", 7, lambda r: number(r.floor)),
        Column("algbw", "(GB/s)", 7, lambda r: number(r.algbw)),
        Column("busbw", "(GB/s)", 7, lambda r: number(r.busbw)),
        Column("memcpy", "(GB/s)", 7, lambda r: number(r.memcpy)),
        *[against(rival) for rival in rivals],
        Column("#wrong", "", 7, lambda r: "N/A" if r.nwrong is None else str(r.nwrong)),
    ]


def print_titles(columns: Sequence[Column]) -> None:
    print("# " + " ".join(f"{c.title:>{c.width}}" for c in columns))
    print("# " + " ".join(f"{c.unit:>{c.width}}" for c in columns), flush=True)


def print_row(columns: Sequence[Column], row: Any) -> None:
    print("  " + " ".join(f"{c.cell(row):>{c.width}}" for c in columns), flush=True)


def print_header(header: dict[str, Any]) -> None:
    """One line a fact; what differs from rank to rank as a list by rank."""
    print(f"# {header['command']}")
    for name, fact in header.items():
        if name != "command":
            print(f"# {name.replace('_', ' '):<18} {spell(fact)}")
    print("#")


def spell(fact: Any) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    if isinstance(fact, list):
        return " | ".join(spell_item(item) for item in fact)
    return "not set" if fact is None else str(fact)


def spell_item(item: Any) -> str:
    return ",".join(map(str, item)) if isinstance(item, list) else str(item)


def print_footer(results: Sequence[Result], rivals: Sequence[str]) -> None:
    wrong = [r.nwrong for r in results if r.nwrong is not None]
    verdict = "not checked" if not wrong else f"{sum(wrong)} {'FAILED' if sum(wrong) else 'OK'}"
    print(f"#\n# Wrong elements       : {verdict}")
    for line in name_culprits(results):
        print(f"#   {line}")
    for title, figures in (
        ("Avg floor bandwidth", [r.floor for r in results]),
        ("Avg memcpy bandwidth", [r.memcpy for r in results]),
        ("Avg bus bandwidth", [r.busbw for r in results]),
    ):
        print(f"# {title:<21}: {np.mean(figures):.2f} GB/s")
    for rival in rivals:
        print(f"# {'Avg ' + rival:<21}: {average_ratio(results, rival)}")


def name_culprits(results: Sequence[Result]) -> list[str]:
    return [
        f"{name}: {wrong} at {r.problem.count} elements"
        for r in results
        for name, wrong in (r.wrong or {}).items()
        if wrong
    ]


def average_ratio(results: Sequence[Result], rival: str) -> str:
    """The geometric mean, because it does not depend on which of the two is the denominator."""
    ratios = [ratio for r in results if (ratio := r.ratio(rival)) is not None]
    return f"{np.exp(np.mean(np.log(ratios))):.2f} x fused" if ratios else "-"


def write_json(file: TextIO, header: dict[str, Any], results: Sequence[Result], **tables: Any) -> None:
    json.dump({"results": [r.as_json() for r in results], **tables, "header": header}, file, indent=2)
    file.write("\n")
