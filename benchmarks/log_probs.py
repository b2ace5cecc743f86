"""What it costs to score only the response: `get_response_log_probs(..., response_mask=mask)` against three other ways.

Each way runs the model and backward, on the same batch and one after the other. Time is that of the processor, on one
thread, or of the GPU; memory is the most that PyTorch's allocator held at once beyond what was there before.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler announces each start and stop

import torch
from torch.nn import functional as F

from sft_edu import TinyLM, default_device, get_response_log_probs

B, T, V = 4, 256, 32_000
SHARES = (0.1, 0.3, 0.5, 0.7, 1.0)
MEBIBYTE = 2**20


def plain(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What most people write."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def selective_log_softmax(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The formula of TRL's function of that name for float32: the label's logit minus logsumexp, row by row.

    Source: https://github.com/huggingface/trl, `selective_log_softmax`.
    """
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([row.logsumexp(-1) for row in logits])


def ways(model: torch.nn.Module) -> dict[str, Callable[..., torch.Tensor]]:
    """Name -> log-probs `[B, T]`, 0 where the mask is."""

    def on_everything(formula: Callable) -> Callable[..., torch.Tensor]:
        def log_probs(ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            output = model(ids)
            return torch.where(mask, formula(getattr(output, "logits", output), labels), 0)

        return log_probs

    def ours(ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return get_response_log_probs(model, ids, labels, response_mask=mask)["log_probs"]

    others = {"plain": plain, "cross_entropy": cross_entropy, "TRL": selective_log_softmax}
    return {name: on_everything(formula) for name, formula in others.items()} | {"ours": ours}


def models() -> dict[str, torch.nn.Module]:
    tiny = {"TinyLM, d=64": TinyLM(vocab_size=V)}
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ModuleNotFoundError:
        print('LlamaForCausalLM is left out: it needs transformers, pip install "sft-edu[hf]"')
        return tiny
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny | {"LlamaForCausalLM, d=128": LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes))}


def batch(share: float, device: torch.device) -> tuple[torch.Tensor, ...]:
    """A share of the positions, drawn at random, is response."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(V, (2, B, T), generator=generator)
    mask = torch.zeros(B * T, dtype=torch.bool)
    mask[torch.randperm(B * T, generator=generator)[: round(share * B * T)]] = True
    return tuple(tensor.to(device) for tensor in (ids, labels, mask.view(B, T)))


def seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()  # not the wall clock: it counts what else the machine is doing
        run()
        return time.process_time() - start
    torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    if device.type == "cpu":
        return _peak_of_the_cpu(run)
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    run()
    return torch.accelerator.max_memory_allocated() - before


def _peak_of_the_cpu(run: Callable[[], None]) -> int:
    """From the profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def measure(model: torch.nn.Module, share: float, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each round, and bytes. A round times every way, so that a busy machine is unkind to all."""
    device = next(model.parameters()).device
    tensors = batch(share, device)
    for parameter in model.parameters():  # gradients are there with any way: they are not what is compared
        parameter.grad = torch.zeros_like(parameter)

    def runner(log_probs: Callable[..., torch.Tensor]) -> Callable[[], None]:
        return lambda: (-log_probs(*tensors).sum()).backward()

    runs = {name: runner(log_probs) for name, log_probs in ways(model).items()}
    for run in runs.values():
        run()  # the first is always slower
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return times, {name: peak_bytes(run, device) for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", type=torch.device, default=default_device())
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"B={B}, T={T}, V={V:,}, forward and backward, on {options.device}")
    for name, model in models().items():
        print(f"\n{name:<24}" + "".join(f"{way:>25}" for way in ways(model)))
        speedups = {}
        for share in SHARES:
            times, peaks = measure(model.to(options.device), share, options.rounds)
            middle = {way: statistics.median(one) for way, one in times.items()}
            # The ratio within a round, and of those the middle one.
            ratios = [theirs / ours for theirs, ours in zip(times["plain"], times["ours"], strict=True)]
            speedups[share] = statistics.median(ratios)
            cells = (f"{middle[way] * 1e3:.0f} ms, {peaks[way] / MEBIBYTE:.0f} MiB" for way in times)
            print(f"{share:>5.0%} response          " + "".join(f"{cell:>25}" for cell in cells))
        print("ours is faster than plain: " + ", ".join(f"{speedups[share]:.2f}x at {share:.0%}" for share in SHARES))
        goal("at 30 % at least 2.5 times as fast as plain", speedups[0.3] >= 2.5)
        goal("at 100 % at most 1.05 times as long as plain", speedups[1.0] >= 1 / 1.05)


def goal(text: str, met: bool) -> None:
    print(f"{text}: {'met' if met else 'MISSED'}")


if __name__ == "__main__":
    main()
