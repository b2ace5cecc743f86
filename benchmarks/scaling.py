"""How the cost of a minibatch grows, in one dimension at a time, and what a second rank brings and costs.

Each line is the exponent k of the power law cost ~ size^k that fits best: 0 is flat, 1 is a straight line. Operations
and bytes are counts; seconds are the least of several rounds that time all sizes in turn. On an accelerator its own
allocator's peak is measured too.
"""

import sys
import time
from collections.abc import Sequence

import torch

from sft_edu import TinyLM, default_device, split_minibatch
from sft_edu.ragged import ragged_minibatch
from sft_edu.ranks.costs import ddp_traffic, fsdp_traffic
from sft_edu.ranks.real import run_ranks
from sft_edu.ranks.step_costs import Size, StepCost, growth, peak_allocated, seconds_per_token, step_cost

SWEEPS = {
    "microbatch_size": (1, 2, 4, 8, 16, 32),
    "length": (16, 32, 64, 128, 256),
    "vocab_size": (256, 512, 1024, 2048, 4096),
    "gradient_accumulation_steps": (1, 2, 4, 8, 16),
}
RANKS = (1, 2)
SEQUENCES, MICROBATCHES = 32, 8


def sweep(name: str, values: Sequence[int], device: torch.device) -> None:
    sizes = [Size(**{name: value}) for value in values]
    costs = [step_cost(size, device) for size in sizes]
    seconds = seconds_per_token(sizes, device)
    rows: dict[str, list[float]] = {
        "operations per token": [cost.operations_per_token for cost in costs],
        "bytes held for backward": [cost.held for cost in costs],
        "seconds per token": seconds,
    }
    if device.type != "cpu":
        rows["peak of the allocator"] = [peak_allocated(size, device) for size in sizes]
    print(f"{name} {values[0]} to {values[-1]}: {1 / seconds[0]:,.0f} to {1 / seconds[-1]:,.0f} tokens/s")
    for label, row in rows.items():
        print(f"  {label:<24} k = {growth(values, row):+.2f}, last/first {row[-1] / row[0]:.2f}")
    print(f"  held by the last: {costs[-1].held / 2**20:.1f} MiB{_straight(costs, values)}")


def _straight(costs: Sequence[StepCost], values: Sequence[int]) -> str:
    """Whether memory is a straight line in the size: all steps along it have one slope."""
    pairs = zip(costs, costs[1:], values, values[1:], strict=False)
    slopes = [(late.held - early.held) / (after - before) for early, late, before, after in pairs]
    return f", slopes within {max(slopes) / min(slopes) - 1:.1%}" if min(slopes) > 0 else ""


def ranks() -> None:
    """Real processes on this machine: seconds of the training itself, not of the start."""
    model = TinyLM(d_model=64, num_layers=2, num_heads=4)
    microbatches = split_minibatch(ragged_minibatch(SEQUENCES, 0.5), MICROBATCHES)
    parameter_bytes = sum(parameter.nbytes for parameter in model.parameters())
    seconds = {}
    for world_size in RANKS:
        start = time.perf_counter()
        real = run_ranks(model, microbatches, world_size, timeout=60)
        seconds[world_size] = real.ddp.seconds
        print(f"{world_size} rank{'s' * (world_size > 1)}, the whole call {time.perf_counter() - start:.1f} s:")
        print(f"  all-reduces of gradients per optimizer step: {real.reductions}")
        share = MICROBATCHES // world_size
        formulas = {
            "ddp": ddp_traffic(parameter_bytes, world_size),
            "fsdp": fsdp_traffic(parameter_bytes, world_size, share, scatters_by_all_reduce=True),
        }
        for engine, formula in formulas.items():
            costs = getattr(real, engine)
            came = "not told by this system" if costs.received is None else f"{costs.received / parameter_bytes:.3f}"
            print(
                f"  {engine:<4} received/P {came}, formula {formula / parameter_bytes:.3f}; "
                f"state/P {costs.state / parameter_bytes:.3f}"
            )
    print(f"2 ranks take {seconds[2] / seconds[1]:.2f} times as long as 1 for the same minibatch (DDP, gloo)")


def main() -> None:
    torch.set_num_threads(1)
    device = default_device()
    print(f"device: {device} {torch.cuda.get_device_name() if device.type == 'cuda' else ''}".rstrip())
    for name, values in SWEEPS.items():
        sweep(name, values, device)
    if "--no-ranks" not in sys.argv:
        ranks()


if __name__ == "__main__":
    main()
