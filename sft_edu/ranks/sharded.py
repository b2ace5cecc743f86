"""Ranks that have a part of the model each: FSDP2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_map

from sft_edu.ranks.distributed import Ranks, rehearse
from sft_edu.training.one_process import T


class ShardedRanks(Ranks):
    """One of several processes, each with a part of every weight, gradient and state of the optimizer.

    A forward pass of the model, also for an evaluation, needs all ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layout += " with shards"

    def wrap(self, model: nn.Module) -> nn.Module:
        device = next(model.parameters()).device
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)  # or each rank would keep its part of weights of its own
        mesh = init_device_mesh(device.type, (self.world_size,))
        # A block is gathered when its turn comes, and what is in no block, such as embeddings, for the whole pass.
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
        for block in max(lists, key=len, default=()):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        rehearse(model)
        return model

    @contextlib.contextmanager
    def gradients(self, wrapped: nn.Module, *, travel: bool) -> Iterator[None]:
        wrapped.set_requires_gradient_sync(travel)
        wrapped.set_is_last_backward(travel)
        yield

    def clip(self, model: nn.Module, max_norm: float) -> float:
        return float(clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=True).full_tensor())

    def make_whole(self, model: nn.Module) -> None:
        modules = list(model.modules())
        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation it may not be
        whole = {parameter: self._whole(parameter.detach()) for parameter in model.parameters()}
        if self.rank:
            return
        whole = {parameter: nn.Parameter(tensor) for parameter, tensor in whole.items()}
        for module in modules:
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, whole[parameter])

    def load_state_dict(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, object]
    ) -> list[str]:
        whole, groups = state["optimizer"]["state"], state["optimizer"]["param_groups"]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parts = {
            "model": {name: _part(state["model"][name], like) for name, like in model.state_dict().items()},
            "optimizer": {
                "state": {
                    index: {name: _part(value, parameters[index]) for name, value in values.items()}
                    for index, values in whole.items()
                },
                "param_groups": groups,
            },
        }
        return super().load_state_dict(model, optimizer, {**state, **parts})

    def _whole(self, state: T) -> T:
        def gather(value: object) -> object:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            # Not all ranks keep it: it may be more than all their memory.
            return whole if not isinstance(value, DTensor) else whole.cpu() if self.rank == 0 else None

        return tree_map(gather, state)


def _part(whole: object, like: torch.Tensor) -> object:
    """This rank's part of a tensor that lies in parts as another of its shape does; other values as they are."""
    if not isinstance(like, DTensor) or not isinstance(whole, torch.Tensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
