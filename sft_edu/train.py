"""The SFT loop: accumulate microbatches, clip, step, log. It can stop after any microbatch and go on bit for bit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import torch
from torch import nn

from sft_edu import checks
from sft_edu.encode import Encoded, collate
from sft_edu.log_probs import get_response_log_probs
from sft_edu.step import sft_microbatch_train_step

OPTIMIZERS = ("adamw", "sgd")


class OutOfMemory(RuntimeError):
    """A microbatch does not fit into memory. The text says what would."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        rule: one of `RULES`.
        microbatch_size: sequences in one forward and backward: what has to fit into memory.
        gradient_accumulation_steps: G, microbatches in one optimizer step.
        normalize_constant: c > 0.
        num_epochs: how often each example is seen.
        optimizer: "adamw" or "sgd".
        learning_rate: its highest value, after `warmup_steps` optimizer steps; then it falls along half a cosine.
        warmup_steps: optimizer steps until then.
        final_share: of the highest learning rate, left at the end.
        weight_decay: of AdamW and SGD alike.
        max_norm: the gradient is clipped to this length before the optimizer steps; infinity never clips.
        seed: of the order of the examples.

    Raises:
        TypeError, ValueError: the text names the argument, what was given and what is expected.
    """

    rule: str = "token_mean"
    microbatch_size: int = 16
    gradient_accumulation_steps: int = 4
    normalize_constant: float = 1.0
    num_epochs: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    final_share: float = 0.05
    weight_decay: float = 0.01
    max_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks.check_rule(self.rule)
        checks.check_steps(self.gradient_accumulation_steps)
        checks.check_constant(self.normalize_constant, torch.float32)
        for name, low in (("microbatch_size", 1), ("num_epochs", 1), ("warmup_steps", 0), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name}: got {value!r}; expected an integer of at least {low}")
        for name, high in (("learning_rate", math.inf), ("max_norm", math.inf), ("final_share", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
                raise ValueError(f"{name}: got {value!r}; expected a number above 0{' up to 1' * (high == 1)}")
        if isinstance(self.weight_decay, bool) or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: got {self.weight_decay!r}; expected a number of at least 0")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: got {self.optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")


@dataclass(frozen=True)
class Record:
    """What one optimizer step did. Sums run over the response tokens of all its microbatches.

    `nll` is `-log p` and `entropy` the entropy per response token, in nats. `notes_loss` is what the course notes log:
    the mean over the microbatches of `-masked_sum / G²`; it depends on G and on the lengths of responses.
    `grad_norm` is the gradient's length before clipping and `clipped_norm` after it.
    """

    step: int
    epoch: float
    num_tokens: int
    nll: float
    notes_loss: float
    entropy: float
    grad_norm: float
    clipped_norm: float
    learning_rate: float


@dataclass
class _Window:
    """What the microbatches of the unfinished optimizer step have added up to."""

    index: int = 0  # microbatches done
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    flags: list[torch.Tensor] = field(default_factory=list)


class Training:
    """One SFT run.

        for record in Training(model, examples, TrainConfig(), pad_token_id=tokenizer.pad_token_id):
            print(record.step, record.nll)

    Each epoch sees every example once, in an order that follows from the seed. The last window of an epoch may hold
    fewer microbatches than G, and its last microbatch fewer sequences: it is stepped with the G and N that it has.

    Args:
        model: returns logits `[B, T, V]`, or an object whose `.logits` they are. It is trained in place, on the device
            where it is; on an accelerator the forward pass runs in bfloat16 (autocast).
        examples: what `encode` returns, at least one.
        config: see `TrainConfig`.
        pad_token_id: what fills the shorter sequences of a microbatch.

    Raises:
        TypeError, ValueError: see `TrainConfig`; or there is no example with a response token.
    """

    def __init__(
        self, model: nn.Module, examples: Sequence[Encoded], config: TrainConfig, *, pad_token_id: int = 0
    ) -> None:
        if not any(any(example.is_response) for example in examples):
            raise ValueError(f"examples: got {len(examples)} without a response token; expected at least one with some")
        self.model, self.examples, self.config, self.pad_token_id = model, examples, config, pad_token_id
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, config)
        self.step = 0  # optimizer steps done
        self._window = _Window()

    @property
    def minibatch_size(self) -> int:
        """Sequences in one optimizer step."""
        return self.config.microbatch_size * self.config.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self.minibatch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.config.num_epochs

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps

    @property
    def microbatch(self) -> int:
        """Microbatches done of the unfinished optimizer step."""
        return self._window.index

    def __iter__(self) -> Iterator[Record]:
        """Train on from where the run is, one optimizer step for each record."""
        while not self.finished:
            record = self.run_microbatch()
            if record is not None:
                yield record

    def minibatch(self) -> list[list[Encoded]]:
        """The microbatches of the optimizer step at hand."""
        epoch, window = divmod(self.step, self.steps_per_epoch)
        order = _order(len(self.examples), self.config.seed + epoch)
        chosen = order[window * self.minibatch_size : (window + 1) * self.minibatch_size]
        return [[self.examples[i] for i in part] for part in chosen.split(self.config.microbatch_size)]

    def run_microbatch(self) -> Record | None:
        """One forward and backward and, after the last of the window, one optimizer step.

        Returns:
            The record of the optimizer step, or None where none was made.

        Raises:
            OutOfMemory: it does not fit; what to do is in the text.
            ValueError: the model gave log-probs that are not finite; nothing was stepped.
        """
        microbatches = self.minibatch()
        examples = microbatches[self._window.index]
        # Counted before the first backward: it divides every microbatch.
        minibatch_tokens = max(sum(sum(e.is_response[1:]) for part in microbatches for e in part), 1)
        try:
            self._accumulate(collate(examples, self.pad_token_id), len(microbatches), minibatch_tokens)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(_smaller(self.config, examples, self.device)) from error
        self._window.index += 1
        return self._optimizer_step(len(microbatches)) if self._window.index == len(microbatches) else None

    def _accumulate(self, batch: dict[str, torch.Tensor], steps: int, minibatch_tokens: int) -> None:
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        mask = batch["response_mask"]
        with self._precision():
            scored = get_response_log_probs(self.model, batch["input_ids"], batch["labels"], return_token_entropy=True)
        _, metadata = sft_microbatch_train_step(
            scored["log_probs"],
            mask,
            steps,
            self.config.normalize_constant,
            rule=self.config.rule,
            minibatch_tokens=minibatch_tokens,
        )
        selected = {"log_prob": scored["log_probs"].detach(), "entropy": scored["token_entropy"]}
        new = {name: torch.where(mask, value, 0).sum() for name, value in selected.items()}
        new |= {"masked_sum": metadata["masked_sum"], "num_tokens": metadata["num_tokens"]}
        old = self._window.sums
        self._window.sums = {name: old[name] + value if name in old else value for name, value in new.items()}
        self._window.flags.append(metadata["value_flags"])

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _optimizer_step(self, steps: int) -> Record:
        checks.raise_for_bad_values(*({"value_flags": flags} for flags in self._window.flags))
        learning_rate = learning_rate_at(self.step, self.num_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_norm, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        sums = {name: float(value) for name, value in self._window.sums.items()}
        self._window = _Window()
        num_tokens = max(sums["num_tokens"], 1)
        return Record(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            num_tokens=int(sums["num_tokens"]),
            nll=-sums["log_prob"] / num_tokens,
            notes_loss=-sums["masked_sum"] / steps**3,
            entropy=sums["entropy"] / num_tokens,
            grad_norm=float(grad_norm),
            clipped_norm=min(float(grad_norm), self.config.max_norm),
            learning_rate=learning_rate,
        )

    def state_dict(self) -> dict[str, object]:
        """All that the run needs to go on bit for bit, also in the middle of a minibatch; see `load_state_dict`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "grad": {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None},
            "step": self.step,
            "microbatch": self._window.index,
            "sums": self._window.sums,
            "flags": self._window.flags,
            "config": asdict(self.config),
            "num_examples": len(self.examples),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from where another run of the same model, examples and config was.

        Raises:
            ValueError: config or examples are others; nothing has changed.
        """
        given = {"config": asdict(self.config), "num_examples": len(self.examples)}
        for name, value in given.items():
            if state[name] != value:
                raise ValueError(f"{name}: got {value}; expected {state[name]}, with which the run began")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, parameter in self.model.named_parameters():
            gradient = state["grad"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        self.step = state["step"]
        on_device = {name: value.to(self.device, copy=True) for name, value in state["sums"].items()}
        self._window = _Window(state["microbatch"], on_device, [flags.to(self.device) for flags in state["flags"]])


@lru_cache(maxsize=1)
def _order(num_examples: int, seed: int) -> torch.Tensor:
    """The order of an epoch, which every microbatch of it asks for."""
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))


def learning_rate_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0: a straight line up, then half a cosine down.

    Source:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (2017), one cycle of it.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    share = config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * share


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with the betas that language models are trained with, or plain SGD."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    betas = (0.9, 0.95)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The CPU has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _smaller(config: TrainConfig, examples: Sequence[Encoded], device: torch.device) -> str:
    longest, size, steps = (
        max(len(e.input_ids) for e in examples),
        config.microbatch_size,
        (config.gradient_accumulation_steps),
    )
    text = (
        f"microbatch_size: {len(examples)} sequences of up to {longest} tokens do not fit into the memory of {device}."
    )
    if size == 1:
        return f"{text} One sequence is the least: take shorter ones (max_length) or a smaller model."
    half = size // 2
    return (
        f"{text} Try microbatch_size {half} with gradient_accumulation_steps {math.ceil(size * steps / half)}: under "
        "token_mean it is the same gradient."
    )
