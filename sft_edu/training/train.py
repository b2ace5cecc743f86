"""The SFT loop: accumulate microbatches, clip, step, log. It can stop after any microbatch and go on bit for bit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import nn

from sft_edu import checks
from sft_edu.data.encode import Encoded, collate, fingerprint
from sft_edu.log_probs import get_response_log_probs
from sft_edu.step import sft_microbatch_train_step
from sft_edu.training.one_process import OneProcess
from sft_edu.training.train_config import TrainConfig, learning_rate_at, make_optimizer


class OutOfMemory(RuntimeError):
    """A microbatch does not fit into memory. The text says what would."""


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
    """The unfinished optimizer step: its microbatches, and what those that are done have added up to."""

    steps: int  # its microbatches, on all ranks
    num_tokens: int  # their response tokens
    share: list[list[Encoded]]  # this rank's microbatch in each round; an empty one where there is none
    index: int = 0  # rounds done
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    flags: list[torch.Tensor] = field(default_factory=list)
    error: ValueError | None = None


class Training:
    """One SFT run.

        for record in Training(model, examples, TrainConfig(), pad_token_id=tokenizer.pad_token_id):
            print(record.step, record.nll)

    Each epoch sees every example once, in an order that follows from the seed. The last window of an epoch may hold
    fewer microbatches than G, and its last microbatch fewer sequences: it is stepped with the G and N that it has.

    Several ranks share the microbatches of each optimizer step. The config says the same as on one: metrics and
    weights differ only by the order in which sums are added up.

    Args:
        model: returns logits `[B, T, V]`, or an object whose `.logits` they are. It is trained in place, on the device
            where it is; on an accelerator the forward pass runs in bfloat16 (autocast).
        examples: what `encode` returns, at least one; all of them on every rank.
        config: see `TrainConfig`.
        pad_token_id: what fills the shorter sequences of a microbatch.
        ranks: who shares the work; nobody when None. See `Ranks`.

    Raises:
        TypeError, ValueError: see `TrainConfig`; or there is no example with a response token; or the ranks were given
            different models, examples or configs.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Encoded],
        config: TrainConfig,
        *,
        pad_token_id: int = 0,
        ranks: OneProcess | None = None,
    ) -> None:
        self.model, self.examples, self.config, self.pad_token_id = model, examples, config, pad_token_id
        self.ranks = ranks or OneProcess()
        self.ranks.agree(model, examples, {**asdict(config), "pad_token_id": pad_token_id})
        if not any(any(example.is_response) for example in examples):
            raise ValueError(f"examples: got {len(examples)} without a response token; expected at least one with some")
        self.device = next(model.parameters()).device
        self._wrapped = self.ranks.wrap(model)
        self.optimizer = make_optimizer(model, config)
        self.step = 0  # optimizer steps done
        self._window: _Window | None = None

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

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.examples)

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps

    @property
    def microbatch(self) -> int:
        """Microbatches that this rank has done of the unfinished optimizer step."""
        return self._window.index if self._window else 0

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
        """One forward and backward on every rank and, after the last of the window, one optimizer step.

        Returns:
            The record of the optimizer step, or None where none was made.

        Raises:
            OutOfMemory: it does not fit; what to do is in the text.
            ValueError: the model gave log-probs that are not finite; nothing was stepped. Ranks raise it together,
                before they step, and name the one that it happened on.
            RuntimeError: the gradient is not finite; nothing was stepped.

        After any error the minibatch begins anew.
        """
        window = self._window = self._window or self._open_window()
        microbatch, is_last = window.share[window.index], window.index + 1 == len(window.share)
        try:
            with self.ranks.gradients(self._wrapped, travel=is_last):
                self._accumulate(window, microbatch)
            window.index += 1
            return self._optimizer_step(window) if is_last else None
        except BaseException as error:
            self._drop_window()  # nobody knows how much of the microbatch is in the gradients
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise OutOfMemory(_smaller(self.config, microbatch, self.device)) from error
            raise

    def agree_to_stop(self, should_stop: Callable[[], bool]) -> bool:
        """Whether to stop here, as `should_stop` says; where ranks wait for each other, one of them is enough.

        Ranks are asked between optimizer steps only: between microbatches they do not talk.
        """
        if self.ranks.lockstep and self.microbatch:
            return False
        return self.ranks.any(should_stop())

    def _open_window(self) -> _Window:
        microbatches = self.minibatch()
        share = self.ranks.share(microbatches)
        # Counted before the first backward: it divides every microbatch.
        num_tokens = self.ranks.count(sum(sum(e.is_response[1:]) for microbatch in share for e in microbatch))
        return _Window(len(microbatches), max(num_tokens, 1), share)

    def _accumulate(self, window: _Window, microbatch: list[Encoded]) -> None:
        # A rank that has none left runs two tokens that count for nothing: the others wait for its backward.
        batch = collate(microbatch or [Encoded((self.pad_token_id,) * 2, (False,) * 2)], self.pad_token_id)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        mask = batch["response_mask"]
        with self._precision():
            scored = get_response_log_probs(self._wrapped, **batch, return_token_entropy=True)
        log_probs = self.ranks.weigh(scored["log_probs"])
        try:
            _, metadata = sft_microbatch_train_step(
                log_probs,
                mask,
                window.steps,
                self.config.normalize_constant,
                rule=self.config.rule,
                minibatch_tokens=window.num_tokens,
            )
        except ValueError as error:
            if not self.ranks.lockstep:
                raise
            window.error = error
            (0 * log_probs.sum()).backward()
            return
        new = {"log_prob": scored["log_probs"].detach().sum(), "entropy": scored["token_entropy"].sum()}
        new |= {"masked_sum": metadata["masked_sum"], "num_tokens": metadata["num_tokens"]}
        window.sums = {name: window.sums[name] + value if window.sums else value for name, value in new.items()}
        window.flags.append(metadata["value_flags"])

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _optimizer_step(self, window: _Window) -> Record:
        sums = self.ranks.total(window.sums, window.error or _bad_values(window.flags))
        learning_rate = learning_rate_at(self.step, self.num_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        grad_norm = self.ranks.clip(self.model, self.config.max_norm)
        self.optimizer.step()
        self.step += 1
        self._drop_window()
        num_tokens = max(sums["num_tokens"], 1)
        return Record(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            num_tokens=int(sums["num_tokens"]),
            nll=-sums["log_prob"] / num_tokens,
            notes_loss=-sums["masked_sum"] / window.steps**3,
            entropy=sums["entropy"] / num_tokens,
            grad_norm=grad_norm,
            clipped_norm=min(grad_norm, self.config.max_norm),
            learning_rate=learning_rate,
        )

    def state_dict(self) -> dict[str, object]:
        """All that the run needs to go on bit for bit, also in the middle of a minibatch; see `load_state_dict`.

        Every rank has to call it, between optimizer steps. The first gets the state, which any number of ranks can go
        on from; the others get an empty dict.

        Raises:
            RuntimeError: ranks are in the middle of a minibatch, where each holds a part of the gradient.
        """
        if self.ranks.lockstep and self._window:
            raise RuntimeError(
                f"state_dict: got a call after {self.microbatch} microbatches of a minibatch; expected one between "
                "optimizer steps, where the ranks hold the same"
            )
        state = self.ranks.state_dict(self.model, self.optimizer)
        if not state:
            return {}
        window = self._window or _Window(0, 0, [])
        return state | {
            "grad": {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None},
            "step": self.step,
            "microbatch": window.index,
            "sums": window.sums,
            "flags": window.flags,
            "config": asdict(self.config),
            "examples": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, object]) -> list[str]:
        """Go on from where another run of the same model, examples and config was, on any number of ranks.

        Every rank is given the same state. Ranks begin a minibatch anew that was stopped in the middle.

        Returns:
            What keeps the run from being equal bit for bit to one that was never stopped, a sentence each.

        Raises:
            ValueError: model, config or examples are others; nothing has changed.
        """
        given = {"config": asdict(self.config), "examples": self._fingerprint}
        for name, value in given.items():
            if state[name] != value:
                raise ValueError(f"{name}: got {value}; expected {state[name]}, with which the run began")
        found, expected = _shapes(self.model.state_dict()), _shapes(state["model"])
        for name in found | expected:
            shape, before = found.get(name, "none"), expected.get(name, "none")
            if shape != before:
                raise ValueError(f"model: got {name} {shape}; expected {before}, with which the run began")
        differences = self.ranks.load_state_dict(self.model, self.optimizer, state)
        self.step = state["step"]
        self._drop_window()
        if state["microbatch"] and not self.ranks.lockstep:
            self._load_window(state)
        return differences

    def _drop_window(self) -> None:
        self._window = None
        self.optimizer.zero_grad()

    def _load_window(self, state: dict[str, object]) -> None:
        for name, parameter in self.model.named_parameters():
            gradient = state["grad"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)
        window = self._window = self._open_window()
        window.index = state["microbatch"]
        window.sums = {name: value.to(self.device, copy=True) for name, value in state["sums"].items()}
        window.flags = [flags.to(self.device) for flags in state["flags"]]


@lru_cache(maxsize=1)
def _order(num_examples: int, seed: int) -> torch.Tensor:
    """The order of an epoch, which every microbatch of it asks for."""
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))


def _shapes(weights: Mapping[str, object]) -> dict[str, str]:
    return {name: f"{list(w.shape)} {w.dtype}" for name, w in weights.items() if isinstance(w, torch.Tensor)}


def _bad_values(flags: Sequence[torch.Tensor]) -> ValueError | None:
    try:
        checks.raise_for_bad_values(*({"value_flags": one} for one in flags))
    except ValueError as error:
        return error
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory does not suffice. On the CPU it has no class of its own."""
    has_class = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return has_class or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _smaller(config: TrainConfig, examples: Sequence[Encoded], device: torch.device) -> str:
    longest = max(len(e.input_ids) for e in examples)
    text = (
        f"microbatch_size: {len(examples)} sequences of up to {longest} tokens do not fit into the memory of {device}."
    )
    size = config.microbatch_size
    if size == 1:
        return f"{text} One sequence is the least: take shorter ones (max_length) or a smaller model."
    together = size * config.gradient_accumulation_steps
    smaller = next(divisor for divisor in range(size // 2, 0, -1) if together % divisor == 0)
    return (
        f"{text} Try microbatch_size {smaller} with gradient_accumulation_steps {together // smaller}: "
        "under token_mean it is the same gradient."
    )
