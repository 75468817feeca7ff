"""What the CUDA compiler said of the kernels: none of them spills registers, and the unrolled ones need no stack."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-{Path(sys.prefix).name.lstrip('.')}"
OBJECTS = BUILD / "CMakeFiles" / "xc_cuda.dir" / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads",
    re.DOTALL,
)
UNROLLED = re.compile(
    r"(?:StepBody|ReduceBody|GradientSquaresBody)I.*Li([1248])EEEEE?v"
)  # mangled: the number of workers is last


class Kernel(NamedTuple):
    name: str
    architecture: str
    stack: int
    spilled: int


def kernels_in(text):
    return [
        Kernel(k["name"], k["architecture"], int(k["stack"]), int(k["stores"]) + int(k["loads"]))
        for k in KERNEL.finditer(text)
    ]


@pytest.fixture(scope="module")
def kernels():
    files = sorted(OBJECTS.glob("*.ptxas.txt"))
    if find_spec("extrapcomm._cuda") is None or not files:
        pytest.skip("there was no nvcc when this was built")
    return [kernel for file in files for kernel in kernels_in(file.read_text())]


def test_kernels_are_compiled_for_every_architecture(kernels):
    counts = [sum(k.architecture == a for k in kernels) for a in ARCHITECTURES]
    assert len(set(counts)) == 1 and counts[0] > 200, dict(zip(ARCHITECTURES, counts, strict=True))


def test_kernels_spill_no_registers(kernels):
    assert [k for k in kernels if k.spilled] == []


def test_unrolled_kernels_need_no_stack(kernels):
    unrolled = [k for k in kernels if UNROLLED.search(k.name)]
    assert len(unrolled) > 100
    assert [k for k in unrolled if k.stack] == []


def test_spills_and_stacks_are_seen():
    name = "_ZN2xc10over_cellsINS_8StepBodyINS_4Bf16ENS_8AdamRuleIfLb1EEELi4EEEEEvNS_6LaunchE"
    text = (
        f"ptxas info    : Compiling entry function '{name}' for 'sm_100'\n"
        f"ptxas info    : Function properties for {name}\n"
        "    32 bytes stack frame, 28 bytes spill stores, 56 bytes spill loads\n"
        "ptxas info    : Used 96 registers\n"
    )
    assert kernels_in(text) == [Kernel(name, "sm_100", 32, 84)]
    assert UNROLLED.search(name).group(1) == "4"
    assert not UNROLLED.search(name.replace("Li4", "Li0"))
