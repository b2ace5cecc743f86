"""One run of the training lab: a tiny model that learns, and what has been seen of it so far."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from sft_edu.data.encode import Encoded, encode
from sft_edu.data.examples import Conversation, Example
from sft_edu.model import default_device
from sft_edu.tokens import ByteTokenizer
from sft_edu.training.evaluate import Evaluation, Scores
from sft_edu.training.tiny_run import TINY_CONFIG, TINY_LENGTH, tiny_examples, tiny_model
from sft_edu.training.train import Record, Training

LOOKS = 40  # at the held-out examples, in a run
_OWN_SEQUENCES = 12_800  # that a run on people's own examples sees

Examples = Sequence[Example | Conversation]


@dataclass(frozen=True)
class Material:
    """What the runs of a lab have in common: examples as tokens, and what the untrained model scores.

    Attributes:
        examples: to train on.
        evaluation: of the held-out examples.
        num_sequences: that a run sees; examples come again if there are fewer.
        untrained: the scores of a model without training.
    """

    examples: Sequence[Encoded]
    evaluation: Evaluation
    num_sequences: int
    untrained: Scores

    @classmethod
    def of(cls, examples: Examples, held_out: Examples, num_sequences: int = _OWN_SEQUENCES) -> Material:
        tokenizer = ByteTokenizer()
        encoded = encode(examples, tokenizer, TINY_LENGTH)
        evaluation = Evaluation(held_out, tokenizer, max_length=TINY_LENGTH, num_answers=6, longest_answer=40)
        with own_settings():
            untrained = evaluation(tiny_model().to(default_device()))
        return cls(encoded, evaluation, num_sequences, untrained)

    def with_prompts(self) -> Sequence[Encoded]:
        """The examples, with every token counted as one of the response."""
        return [Encoded(ids, (True,) * len(ids)) for ids, _ in self.examples]


@lru_cache(maxsize=1)
def built_in() -> Material:
    """The built-in tasks: each example is seen once."""
    examples = tiny_examples()
    return Material.of(examples, tiny_examples("test"), len(examples))


@dataclass(frozen=True)
class Look:
    """At the held-out examples, after some optimizer steps."""

    step: int
    seen: int  # sequences
    scores: Scores


class TrainingRun:
    """A run from the same weights as every other, and all that was recorded of it.

    Args:
        material: what it trains on and is judged by.
        settings: fields of `TrainConfig`, and `train_on_prompt`: whether the prompt's tokens count too. Epochs and
            warm-up follow from the material.

    Attributes:
        settings: as given.
        records: one for each optimizer step.
        looks: at the held-out examples, the first before any training.
        num_tokens: trained on so far, in whole optimizer steps.
        error: what ended the run early, or None.
    """

    def __init__(self, material: Material, settings: Mapping[str, object]) -> None:
        self.settings = dict(settings)
        config = dict(settings)
        examples = material.with_prompts() if config.pop("train_on_prompt") else material.examples
        epochs = max(1, round(material.num_sequences / len(examples)))
        together = config["microbatch_size"] * config["gradient_accumulation_steps"]
        num_steps = epochs * math.ceil(len(examples) / together)
        # A sixteenth of the run, so that runs with few large steps warm up over the same sequences.
        config = replace(TINY_CONFIG, **config, num_epochs=epochs, warmup_steps=num_steps // 16)
        model = tiny_model().to(default_device())
        self.training = Training(model, examples, config, pad_token_id=ByteTokenizer.pad_token_id)
        self.records: list[Record] = []
        self.looks = [Look(0, 0, material.untrained)]
        self.num_tokens = 0
        self.error: Exception | None = None
        self._evaluation = material.evaluation
        self._every = max(1, num_steps // LOOKS)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, or nothing can be done."""
        return self.training.finished or self.error is not None

    @property
    def num_asked(self) -> int:
        """Examples that are looked at."""
        return len(self._evaluation.examples)

    @property
    def seen(self) -> int:
        """Sequences in the optimizer steps so far."""
        return self.seen_after(self.training.step)

    @property
    def num_sequences(self) -> int:
        """Sequences of the whole run."""
        return self.seen_after(self.training.num_steps)

    def seen_after(self, step: int) -> int:
        epoch, window = divmod(step, self.training.steps_per_epoch)
        return epoch * len(self.training.examples) + window * self.training.minibatch_size

    def advance(self) -> bool:
        """One microbatch. Says whether it was the last of an optimizer step. An error ends the run."""
        try:
            record = self.training.run_microbatch()
            if record is None:
                return False
            self.num_tokens += record.num_tokens
            self.records.append(record)
            if self.training.finished or record.step % self._every == 0:
                self.look()
        except Exception as error:
            self.error = error
        return True

    def look(self) -> None:
        """Score the model as it is now, if that is not known."""
        step = self.training.step
        if self.looks[-1].step < step and self.error is None:
            self.looks.append(Look(step, self.seen, self._evaluation(self.training.model)))


@contextmanager
def own_settings() -> Iterator[None]:
    """Grad mode, default device, autocast and the number of threads, as training needs them.

    They belong to a thread, and nobody knows what a cell has set for its own. One thread of torch: a model so small is
    hardly faster with more, and the page and other cells need theirs.
    """
    threads = torch.get_num_threads()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
    ):
        torch.set_num_threads(1)
        # It is also the number that new threads begin with from now on. They get theirs back, from a thread whose own
        # does not matter.
        helper = threading.Thread(target=torch.set_num_threads, args=(threads,))
        helper.start()
        helper.join()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
