"""Builds the C++ part through CMake; what the package is stands in pyproject.toml.

`pip install .` and `pip install -e .` both end here. CMake writes the module into the folder that setuptools
chose and keeps its objects in build/<python>-<environment>, so a second build compiles only what changed.
With an nvcc on PATH the part for GPUs is built as well, unless XC_CUDA=0. XC_CMAKE_ARGS (for example
"-DCMAKE_CXX_COMPILER=clang++") is added to the configuration. The engine knows no MPI: where an editable install for
another MPI has put it into the folder of the package, XC_WIRE_ONLY=1 builds the wire alone.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_CUDA = (12, 8)  # that compiles for all capabilities which are asked for


class CMakeExtension(Extension):
    """A CMake target named like the last part of the module; its sources are listed for the sdist."""

    def __init__(self, name: str) -> None:
        folders = [*(ROOT / "csrc").rglob("*"), *(ROOT / "cmake").iterdir()]
        sources = [ROOT / "CMakeLists.txt", *(path for path in folders if path.is_file())]
        super().__init__(name, sources=[str(path.relative_to(ROOT)) for path in sorted(sources)])

    @property
    def target(self) -> str:
        return self.name.rpartition(".")[2]


class CMakeBuild(build_ext):
    """Configures and builds one CMake target for each extension."""

    def build_extension(self, ext: CMakeExtension) -> None:
        require_tools()
        folder = build_folder()
        run("configure", "cmake", "-S", ROOT, "-B", folder, *self.options(ext))
        run("build", "cmake", "--build", folder, "--target", ext.target, "--parallel", os.cpu_count() or 1)

    def options(self, ext: CMakeExtension) -> list[str]:
        module_folder = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        ninja = shutil.which("ninja")
        return [
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module_folder}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DXC_BUILD_TESTS=OFF",
            f"-DXC_MPI_FAMILY={mpi_family()}",
            f"-DXC_CUDA={'ON' if has_cuda() else 'OFF'}",
            *shlex.split(os.environ.get("XC_CMAKE_ARGS", "")),
        ]


def mpi_family() -> str:
    """openmpi or mpich, as the header of the mpicxx on PATH says; empty without one."""
    if not shutil.which("mpicxx"):
        return ""
    source = "#include <mpi.h>\nopen OMPI_MAJOR_VERSION\nmpich MPICH_NUMVERSION\n"
    command = ["mpicxx", "-E", "-x", "c++", "-"]
    seen = subprocess.run(command, input=source, capture_output=True, text=True, check=False).stdout
    values = dict(line.split(maxsplit=1) for line in seen.splitlines()[-2:] if " " in line)
    if values.get("open", "O")[0].isdigit():
        return "openmpi"
    return "mpich" if values.get("mpich", "M")[0].isdigit() else ""


def has_cuda() -> bool:
    """Whether the part for GPUs is built: where there is an nvcc of CUDA 12.8 or newer, unless XC_CUDA=0."""
    nvcc = shutil.which("nvcc")
    if os.environ.get("XC_CUDA", "1") == "0" or nvcc is None:
        return False
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_CUDA:
        print("the part for GPUs takes CUDA 12.8 or newer, so it is left out")
        return False
    return True


def extensions() -> list[CMakeExtension]:
    """The engine, the wire between hosts for the MPI that is here, and the part for GPUs."""
    wire = [f"_mpi_{mpi_family()}"] if mpi_family() else []
    engine = [] if os.environ.get("XC_WIRE_ONLY") else ["_core", *(["_cuda"] if has_cuda() else [])]
    modules = [*engine, *wire]
    return [CMakeExtension(f"extrapcomm.{module}") for module in modules]


def build_folder() -> Path:
    """One folder for each interpreter and virtual environment: CMake remembers the paths of both."""
    return ROOT / "build" / f"{sys.implementation.cache_tag}-{Path(sys.prefix).name.lstrip('.')}"


def require_tools() -> None:
    """Names what is missing before CMake does so at length."""
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    header = Path(sysconfig.get_path("include"), "Python.h")
    require(shutil.which("cmake"), "cmake", "pip install cmake")
    require(any(map(shutil.which, compilers)), f"a compiler ({', '.join(compilers)})", "apt-get install g++")
    require(header.exists(), f"Python's headers ({header})", "apt-get install python3-dev")


def require(found: object, what: str, remedy: str) -> None:
    if not found:
        raise SystemExit(f"extrapcomm needs {what} and found none: {remedy}, or its like on this system")


def run(step: str, *command: object) -> None:
    words = [str(word) for word in command]
    if code := subprocess.run(words, check=False).returncode:
        raise SystemExit(f"extrapcomm: the {step} step failed with code {code}: {shlex.join(words)}")


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
