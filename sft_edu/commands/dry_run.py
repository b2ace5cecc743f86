"""What a run would do, in words: its first microbatch with the response mask shown, and how large a batch really is."""

from __future__ import annotations

import math
from itertools import groupby

from sft_edu.commands.prepare_run import PreparedRun
from sft_edu.data.encode import Encoded
from sft_edu.digits import compact, number_of
from sft_edu.scaling import RULES
from sft_edu.tokens import Tokenizer, visible_text, visible_token

_OPEN, _CLOSE = "⟦", "⟧"  # the mask must be seen without colour too
_COLOUR, _PLAIN = "\x1b[30;46m", "\x1b[0m"
_LONGEST = 2000  # characters of a sequence that are shown


def describe_run(run: PreparedRun, *, colour: bool = False) -> str:
    """The first microbatch, the tokens that are trained on between `⟦` and `⟧`, and the arithmetic of the run."""
    training = run.training
    first = training.minibatch()[0]
    rows = [f"{row:>4}  {show_mask(sequence, run.tokenizer, colour=colour)}" for row, sequence in enumerate(first)]
    title = f"The first microbatch; what is trained on stands between {_OPEN} and {_CLOSE}:"
    return "\n".join([title, "", *rows, "", *_arithmetic(run)])


def show_mask(sequence: Encoded, tokenizer: Tokenizer, *, colour: bool = False) -> str:
    """A sequence as text on one line, its response tokens marked."""
    shown, left = "", _LONGEST
    pairs = zip(sequence.input_ids, sequence.is_response, strict=True)
    for is_response, run in groupby(pairs, key=lambda pair: pair[1]):
        text = _text([token for token, _ in run], tokenizer)
        text, left = text[:left] + "…" * (len(text) > left), left - len(text)
        marked = f"{_OPEN}{text}{_CLOSE}" if is_response else text
        shown += f"{_COLOUR}{marked}{_PLAIN}" if is_response and colour else marked
        if left < 0:
            break
    return shown


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    """Tokens together, because a character may be made of several; special ones by their names."""
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id, getattr(tokenizer, "bos_token_id", None)}
    runs = groupby(ids, key=lambda token: token in special)
    return "".join(
        "".join(visible_token(token, tokenizer) for token in run) if is_special else visible_text(tokenizer.decode(run))
        for is_special, run in ((kind, list(tokens)) for kind, tokens in runs)
    )


def _arithmetic(run: PreparedRun) -> list[str]:
    training, config = run.training, run.training.config
    minibatch = training.minibatch()
    first = minibatch[0]
    longest = max(len(sequence.input_ids) for sequence in first) - 1
    tokens, inside = _count(first)
    minibatch_tokens = _count([sequence for part in minibatch for sequence in part])[1]
    rule = RULES[config.rule]
    symbols = {"1": 1, "c": config.normalize_constant, "B": len(first), "G": len(minibatch), "n": inside}
    denominator = compact(float(rule.denominator(symbols | {"N": minibatch_tokens})))
    trained, steps = len(training.examples), training.steps_per_epoch
    last = trained - (steps - 1) * training.minibatch_size
    epoch = f"{trained:,} sequences / {training.minibatch_size} = {number_of(steps, 'optimizer step')}"
    if last < training.minibatch_size:
        epoch += f", the last with {last} in {number_of(math.ceil(last / config.microbatch_size), 'microbatch', 'es')}"
    return [
        f"Data            {run.examples}",
        f"                {run.split}",
        f"Microbatch      {len(first)} sequences x {longest} positions = {len(first) * longest:,}: "
        f"{inside:,} response, {tokens - inside:,} prompt, {len(first) * longest - tokens:,} padding",
        f"Optimizer step  {config.microbatch_size} sequences x {config.gradient_accumulation_steps} microbatches = "
        f"{training.minibatch_size} sequences; the first has {minibatch_tokens:,} response tokens",
        f"Epoch           {epoch}",
        f"Run             {steps:,} x {number_of(config.num_epochs, 'epoch')} = "
        f"{number_of(training.num_steps, 'step')}; learning rate up to {config.learning_rate:g} after "
        f"{number_of(config.warmup_steps, 'warm-up step')}, then down towards "
        f"{config.learning_rate * config.final_share:g}",
        f"Rule            {rule.name}, D = {rule.formula}; in the first microbatch D = {denominator}",
        f"Model           {sum(p.numel() for p in training.model.parameters()):,} parameters on {training.device}",
    ]


def _count(sequences: list[Encoded]) -> tuple[int, int]:
    """Labels of the sequences, and how many of them are response tokens. The first token is no label."""
    return sum(len(s.input_ids) - 1 for s in sequences), sum(sum(s.is_response[1:]) for s in sequences)
