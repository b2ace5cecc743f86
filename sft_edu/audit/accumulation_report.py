"""What an audit of an accumulation loop says: objectives, codes, sentences, text and HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sft_edu.audit.denominator import NOT_DETERMINED, TOLERANCE
from sft_edu.audit.report import CONSEQUENCES, KNOWN, NOT_MEASURED, UNKNOWN, counted, table_html

OBJECTIVES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "token_mean": {"N": 1},
        "sequence_mean": {"M": 1},
        "sequence_token_mean": {"n_b": 1, "M": 1},
        "sum": {},
    }
)
"""Full-batch objectives: exponents of the counts in D, none of which depends on the split. M are the sequences of the
minibatch. Read-only."""

RULE_POWERS: Mapping[str, Mapping[str, int]] = MappingProxyType({name: known.powers for name, known in KNOWN.items()})
"""The rules that divide each microbatch by counts of its own. Read-only."""

NAMED = (*OBJECTIVES.items(), *RULE_POWERS.items())
"""Everything with a name. `sequence_mean` is there twice: a loop may count its sequences in M, or in B and G."""

LOOP_PROBLEMS: Mapping[str, str] = MappingProxyType(
    {
        "no-backward": "Nothing is trained: no gradient reaches the model that the loop is given.",
        "wrong-sign": "Every step of the optimizer makes the responses less likely.",
        "mask-ignored": "Prompt and padding are trained as if they were responses.",
        "prompt-tokens-trained": "Tokens outside the mask are trained: as far as they weigh, the model learns to write "
        "prompts or padding.",
        "not-finite": "Infinite or NaN gradients turn the parameters into NaN at the next step of the optimizer.",
        "uneven-weights": "Response tokens do not count alike, so no denominator describes this loop.",
        "foreign-gradient": "Something else is in the gradient than log-probs of these tokens, such as weight decay, "
        "noise or an entropy, so no denominator describes this loop.",
        "clipped": "The length of a clipped gradient says nothing about D. Clip once, before the optimizer step, and "
        "audit the loop without it.",
        "changes-parameters": "The parameters change inside the loop, so its microbatches are not those of one step.",
        "sequences-missing": "Some sequences of the minibatch train nothing.",
        "depends-on-split": "The same sequences train the model differently when they are cut differently: "
        "changing the microbatch size to save memory changes the result.",
        "padding-counted": "D counts padding: the same responses get a smaller gradient beside a longer one.",
        "partial-window": "The last window of an epoch, where it has fewer microbatches, gets a gradient of another "
        "scale.",
        "wrong-on-empty-mask": "A microbatch without response tokens changes the scale of the others.",
        "nan-on-empty-mask": "One microbatch without response tokens turns the whole gradient into NaN.",
        "mutates-input": "Whatever uses the microbatches after the loop sees other values.",
        "not-deterministic": "The same minibatch gives another gradient each time, so nothing can be compared.",
        "raises": "Training stops where the loop raises.",
    }
)
"""Every code that `AccumulationAudit.problems` may hold, in its order, and what it does to training. Read-only."""

_OBJECTIVE_CONSEQUENCES = {
    "token_mean": "It is the full batch's mean over response tokens, however the minibatch is split.",
    "sequence_mean": "It is the full batch's mean over sequences, however the minibatch is split; long responses weigh "
    "more than short ones.",
    "sequence_token_mean": "It is the full batch's mean over sequences, each by its own token count, however the "
    "minibatch is split.",
    "sum": "It is the full batch's sum, however the minibatch is split: it grows with the response tokens, and the "
    "learning rate has to absorb that.",
}


@dataclass(frozen=True)
class Counterexample:
    """The fewest sequences, in the fewest microbatches, whose gradient depends on the split.

    `lengths` are their response tokens, `sizes` the sequences per microbatch. `relative_error` compares with the same
    sequences in one microbatch.
    """

    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    relative_error: float

    def __str__(self) -> str:
        tokens = ", ".join(map(str, self.lengths))
        return (
            f"{len(self.lengths)} sequences of {tokens} response tokens, split {list(self.sizes)}: "
            f"{self.relative_error:.2%} off the same sequences in one microbatch."
        )


@dataclass(frozen=True, repr=False)
class AccumulationAudit:
    """What `audit_accumulation` found; printed, a readable report.

    Attributes:
        name: of the loop.
        objective: the full-batch objective whose gradient every split accumulates to: `token_mean`, `sequence_mean`,
            `sequence_token_mean` or `sum`. None if there is none.
        rule: the objective, or the rule of a single microbatch, that explains every gradient; None if none does.
        formula: the denominator in symbols: those of `StepAudit.formula`, and M, the sequences of the minibatch; M_r
            and B_r where sequences without response tokens are not counted; n_first and n_last, the response tokens of
            the first and of the last microbatch. In words where it was not measured, or the
            data do not determine it.
        invariant: whether the split makes no difference.
        errors: for each objective the largest relative error of a split.
        counterexample: None if invariant.
        problems: codes, in the order of `LOOP_PROBLEMS`.
        details: for each code a sentence with what was measured.
        consequence: what the first problem, or else the objective or rule, does to training.
        runs: how often the loop was called.
    """

    name: str
    objective: str | None
    rule: str | None
    formula: str
    invariant: bool
    errors: Mapping[str, float] = field(hash=False)
    counterexample: Counterexample | None
    problems: tuple[str, ...]
    details: Mapping[str, str] = field(hash=False)
    consequence: str
    runs: int

    @property
    def ok(self) -> bool:
        """No problem was found. Whether the objective is the one you want is another question: compare it."""
        return not self.problems

    def __repr__(self) -> str:
        width = max(map(len, self.problems), default=0)
        lines = [f"  {code.ljust(width)}  {self.details[code]}" for code in self.problems]
        return "\n".join([*self._head(), *lines, self.consequence])

    def _repr_html_(self) -> str:
        first, *more = map(html.escape, self._head())
        head = "<br>".join([f"<strong>{first}</strong>", *more])
        rows = [(code, self.details[code]) for code in self.problems]
        return f"<p>{head}</p>{table_html(rows)}<p>{html.escape(self.consequence)}</p>"

    def _head(self) -> list[str]:
        always = "always " if any(error < TOLERANCE for error in self.errors.values()) else ""
        no_objective = f"not {always}the full batch's gradient; each microbatch: {self.rule or 'no rule with a name'}"
        found = f"the full batch's {self.objective}" if self.objective else no_objective
        lines = [f"{self.name}: {found}, D = {self.formula}"]
        if self.errors:
            errors = ", ".join(f"{name} {_error(error)}" for name, error in self.errors.items())
            lines.append(f"Largest distance from the full batch, over the splits of the whole minibatch: {errors}.")
        return [*lines, counted(len(self.problems), self.runs, "run")]


def loop_consequence(
    objective: str | None, rule: str | None, problems: tuple[str, ...], formula: str, multiple_of: str | None
) -> str:
    """One sentence or two: what the gravest problem, or else the objective or the rule, does to training.

    `multiple_of` is the objective that is the same up to a constant factor, None if there is none.
    """
    if problems:
        # Which rule it is says more than that there is a dependence.
        return CONSEQUENCES[rule] if problems[0] == "depends-on-split" and rule else LOOP_PROBLEMS[problems[0]]
    if objective is not None:
        left_out = " Sequences without response tokens are not counted." if "_r" in formula else ""
        return _OBJECTIVE_CONSEQUENCES[objective] + left_out
    if formula.startswith(NOT_MEASURED):
        return UNKNOWN
    same = "No known objective, but the split makes no difference"
    if multiple_of is not None:
        return f"{same}: it is {multiple_of} times a constant factor, which is left to the learning rate."
    if formula.startswith(NOT_DETERMINED):
        return f"{same}. To have D determined, give more sequences, all of other lengths, and a larger model."
    return f"{same}. D is no fixed multiple of a count, so a larger minibatch is scaled by another factor."


def _error(error: float) -> str:
    # Rounding differs from machine to machine, and so would a printed 3e-16.
    return "0 (up to rounding)" if error < TOLERANCE else f"{error:.1%}" if error >= 5e-4 else f"{error:.0e}"
