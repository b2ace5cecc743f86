"""What `import sft_edu` costs beside the `import torch` that it contains."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(module: str) -> float:
    """The time one import takes in a fresh interpreter."""
    command = [sys.executable, "-c", PROGRAM.format(module)]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def measure(rounds: int) -> tuple[float, float]:
    """The best times of torch and of sft_edu. They take turns, so that a busy machine is unkind to both."""
    seconds("sft_edu")  # writes the byte code and fills the disk cache
    pairs = [(seconds("torch"), seconds("sft_edu")) for _ in range(rounds)]
    best_torch, best_sft_edu = (min(times) for times in zip(*pairs, strict=True))
    return best_torch, best_sft_edu


def main() -> None:
    torch, sft_edu = measure(rounds=10)
    print(f"import sft_edu {sft_edu:.2f} s, import torch {torch:.2f} s: ratio {sft_edu / torch:.3f}")


if __name__ == "__main__":
    main()
