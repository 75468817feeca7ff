"""Row: which NCCL can be opened here, and its version."""

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

from common import skip


def candidates() -> list[str]:
    """That of torch's wheels, then what the loader finds."""
    found = find_spec("nvidia")
    folders = (
        [Path(folder) / "nccl" / "lib" for folder in found.submodule_search_locations or ()] if found else []
    )
    return [*(str(folder / "libnccl.so.2") for folder in folders), "libnccl.so.2"]


def main() -> int:
    for name in candidates():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int()
        if code := library.ncclGetVersion(ctypes.byref(version)):
            print(f"{name}: ncclGetVersion returned {code}")
            return 1
        number = version.value
        print(f"NCCL {number // 10000}.{number // 100 % 100}.{number % 100} in {name}")
        return 0
    skip("no libnccl.so.2 can be opened (pip install nvidia-nccl-cu13)")


if __name__ == "__main__":
    sys.exit(main())
