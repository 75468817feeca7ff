"""Row: the benchmark on one GPU, in a world without MPI."""

import sys
from pathlib import Path

from common import require_gpu
from store_world import StoreWorld

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu  # noqa: E402


def main() -> int:
    require_gpu()
    with StoreWorld() as world:
        results = gpu.run(world, 100_000_000, iterations=20, warmup=5)
    print("; ".join(gpu.in_short(result) for result in results))
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
