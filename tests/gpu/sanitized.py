"""Row: steps of all kinds under compute-sanitizer, in one process.

sanitized.py memcheck|racecheck|synccheck
"""

import os
import shutil
import subprocess
import sys

from common import Twins, require_gpu, skip

COMPLAINED = 9


def main(tool: str) -> int:
    require_gpu()
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if not program:
        skip("there is no compute-sanitizer on PATH")
    command = [program, "--tool", tool, "--error-exitcode", str(COMPLAINED), sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-1000:])
        return 1
    print(
        next(
            (line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK" in line), ""
        )
    )
    return 0


def take_steps() -> int:
    require_gpu()
    settings = [
        {"rule": "sgd", "lr": 0.1, "momentum": 0.9, "extrapolation": "local"},
        {"rule": "adam", "lr": 0.01, "extrapolation": "gaussian", "max_grad_norm": 0.5},
        {"rule": "lamb", "lr": 0.01},
    ]
    for options in settings:
        for dtype, workers in (("float32", 2), ("bfloat16", 3)):
            twins = Twins(workers, dtype, **options)
            for _ in range(2):
                twins.step()
            twins.require_same_bits(str(options))
            twins.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else take_steps())
