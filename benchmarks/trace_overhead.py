"""What the taps of a step cost when nobody listens, and what a trace costs.

The step is compared with itself after every `tap(name, value)` in its source has been replaced by `value`.
"""

import ast
import inspect
import statistics
import timeit
from collections.abc import Callable

import torch

from sft_edu import Trace, sft_microbatch_train_step, step

SHAPE, CALLS, ROUNDS = (8, 512), 50, 101


class _WithoutTaps(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if _is_tap(node.value) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return node.args[1] if _is_tap(node) else node


def _is_tap(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tap"


def without_taps() -> Callable:
    """The step, compiled from its source without the tap calls."""
    tree = ast.fix_missing_locations(_WithoutTaps().visit(ast.parse(inspect.getsource(step))))
    if any(map(_is_tap, ast.walk(tree))):
        raise AssertionError("a tap is left in the step")
    namespace: dict = {"__name__": "step_without_taps"}
    exec(compile(tree, "step_without_taps", "exec"), namespace)
    return namespace["sft_microbatch_train_step"]


def main() -> None:
    torch.set_num_threads(1)
    log_probs = (-torch.rand(SHAPE)).requires_grad_()
    mask = torch.rand(SHAPE) < 0.7
    stripped, trace = without_taps(), Trace()
    runs = {
        "without taps": lambda: stripped(log_probs, mask, 4),
        "untraced": lambda: sft_microbatch_train_step(log_probs, mask, 4),
        "traced": lambda: sft_microbatch_train_step(log_probs, mask, 4, tap=trace),
    }
    # Each round times all three, one after the other, so that they share what else the machine is doing.
    rounds = [[timeit.timeit(run, number=CALLS) / CALLS for run in runs.values()] for _ in range(ROUNDS)]
    untraced = statistics.median(one[1] / one[0] for one in rounds)
    traced = statistics.median(one[2] / one[0] for one in rounds)
    base = statistics.median(one[0] for one in rounds)
    print(f"step [8x512] without taps {base * 1e6:.0f} us: with taps ratio {untraced:.3f}, traced {traced:.2f}")


if __name__ == "__main__":
    main()
