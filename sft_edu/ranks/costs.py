"""What travels to a rank, and what it has to hold, as the ranks and the model grow. Formulas, no measurement.

Symbols: W ranks, P bytes of parameters (and of their gradients), g microbatches that a rank runs for one optimizer
step. What travels is counted on its way into one rank; as much leaves it.

Sources:
    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009): a ring all-reduce
    moves 2(W-1)/W times its payload, half of that in a reduce-scatter and half in an all-gather.
    Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020): sharded states,
    16 bytes per parameter for AdamW in mixed precision, three collectives of (W-1)/W where all is sharded.
    Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023).
"""

from __future__ import annotations

from sft_edu.ranks.simulated import check_world_size

MIXED_PRECISION_BYTES = 16
"""Per parameter: bfloat16 weight and gradient (2 + 2), float32 weight and AdamW's two moments (4 + 4 + 4)."""

STATES = 4
"""Weights, gradients and AdamW's two moments, each as large as the parameters where there is one precision."""


def all_reduce_bytes(payload: float, world_size: int) -> float:
    """Into each rank of a ring: 2(W-1)/W times the payload. Hardly more for a thousand ranks than for ten."""
    return 2 * _of_others(payload, world_size)


def ddp_traffic(parameter_bytes: float, world_size: int) -> float:
    """Of one optimizer step: one all-reduce of the gradients, whatever g is."""
    return all_reduce_bytes(parameter_bytes, world_size)


def fsdp_traffic(
    parameter_bytes: float,
    world_size: int,
    microbatches_per_rank: int = 1,
    *,
    scatters_by_all_reduce: bool = False,
) -> float:
    """Of one optimizer step: the weights come in twice for each microbatch, the gradients are scattered once.

    That is (2g + 1)(W-1)/W times P.

    Args:
        parameter_bytes: P.
        world_size: W.
        microbatches_per_rank: g; only the last one's backward scatters gradients.
        scatters_by_all_reduce: the engine has no reduce-scatter of its own, and takes an all-reduce, as gloo does:
            (2g + 2)(W-1)/W times P.
    """
    collectives = 2 * microbatches_per_rank + (2 if scatters_by_all_reduce else 1)
    return collectives * _of_others(parameter_bytes, world_size)


def state_bytes(num_parameters: float, world_size: int, *, sharded: bool, per_parameter: float) -> float:
    """Weights, gradients and the optimizer's moments on one rank: all of them under DDP, 1/W of them under FSDP.

    What comes on top: the activations, which depend on neither; under FSDP the layer that is gathered at the moment,
    and the whole gradient while microbatches accumulate without a scatter.
    """
    check_world_size(world_size)
    return num_parameters * per_parameter / (world_size if sharded else 1)


def _of_others(payload: float, world_size: int) -> float:
    """The share of a payload that the other ranks have: (W-1)/W."""
    check_world_size(world_size)
    return payload * (world_size - 1) / world_size
