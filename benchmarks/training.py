"""How long `sft-edu train` takes on the built-in tasks, the whole command, and how much of that is the loop alone.

Each round runs the command in a process of its own, and then, in another, the same training without evaluation,
checkpoints, metrics and report.
"""

import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5
LOOP = """
import torch
torch.set_num_threads(1)
from sft_edu.data.encode import encode
from sft_edu.training.tiny_run import TINY_CONFIG, tiny_examples, tiny_model
from sft_edu.tokens import ByteTokenizer
from sft_edu.training.train import Training
for _ in Training(tiny_model(), encode(tiny_examples(), ByteTokenizer()), TINY_CONFIG, pad_token_id=256):
    pass
"""


def seconds_of(*arguments: str) -> tuple[float, float, str]:
    """How long Python runs with these arguments, how long a processor does, and what it prints."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - start, busy, done.stdout


def main() -> None:
    ratios = []
    for number in range(1, ROUNDS + 1):
        with tempfile.TemporaryDirectory() as folder:
            out, seed = str(Path(folder) / "run"), str(number)
            seconds, busy, text = seconds_of("-m", "sft_edu", "train", "--out", out, "--seed", seed)
        _, alone, _ = seconds_of("-c", LOOP)
        ratios.append(busy / alone)
        right = re.search(r"Held out, after step \d+: ([\d.]+%) right", text)[1]
        print(
            f"run {number}: {seconds:.1f} s, {busy:.1f} s of a processor, {right} of the held-out answers right; "
            f"the loop alone {alone:.1f} s of a processor",
            flush=True,
        )
    print(f"ratio of the command to the loop alone {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
