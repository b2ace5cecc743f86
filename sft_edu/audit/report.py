"""What an audit of a step says: codes, sentences, text and HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

from sft_edu.audit.denominator import product_text
from sft_edu.scaling import RULES, Rule

PROBLEMS: Mapping[str, str] = MappingProxyType(
    {
        "no-backward": "Nothing is trained: no gradient reaches the parameters.",
        "wrong-sign": "Every step of the optimizer makes the responses less likely.",
        "mask-ignored": "Prompt and padding are trained as if they were responses.",
        "prompt-tokens-trained": "Tokens outside the mask are trained: as far as they weigh, the model learns to write "
        "prompts or padding.",
        "not-finite": "Infinite or NaN gradients turn the parameters into NaN at the next step of the optimizer.",
        "uneven-weights": "Response tokens do not count alike, so no single denominator describes this step.",
        "sequences-missing": "Some microbatches train nothing.",
        "padding-counted": "D counts padding: the same responses get a smaller gradient beside a longer one.",
        "constant-ignored": "normalize_constant has no effect, whatever value is given.",
        "steps-ignored": "The accumulated gradient grows with the number of microbatches, and so does every update.",
        "loss-attached": "Keeping the returned loss, for a log, keeps the nodes of its graph in memory.",
        "metadata-attached": "Keeping the metadata, for a log, keeps a graph in memory, with all it saved if no "
        "backward ran through it.",
        "overwrites-grad": "Only the last microbatch counts: its gradient replaces what came before.",
        "scales-grad": "What had accumulated is scaled again by every later microbatch, so the first ones count least.",
        "zeroes-grad": "Only the last microbatch counts: earlier gradients are cleared.",
        "mutates-input": "Whatever uses the same tensors after the step sees other values.",
        "nan-on-empty-mask": "One microbatch or sequence without response tokens turns the accumulated gradient or the "
        "logged loss into NaN.",
        "value-mismatch": "The logged loss does not show what is trained on.",
        "not-deterministic": "The same microbatch gives another gradient each time, so no denominator can be measured.",
        "raises": "Training stops where the step raises.",
    }
)
"""Every code that `StepAudit.problems` may hold, in its order, and what the problem does to training. Read-only.

`overwrites-grad` and `zeroes-grad` both lose the gradient that was in `.grad` before the call. They are told apart by
whether autograd itself wrote the new one, which a hook of the leaf sees: if it did, somebody had cleared the old one
(`zeroes-grad`); if not, the step assigned or copied into `.grad` (`overwrites-grad`). One that clears and then assigns
by hand cannot be told from one that only assigns. A step that lets autograd add and then writes another value over the
sum, as clipping does, is `scales-grad`.
"""

_GRADIENT_AS_THE_RULE_SAYS = frozenset({"loss-attached", "metadata-attached", "nan-on-empty-mask", "value-mismatch"})
"""Problems that leave the gradient of the other microbatches what the rule makes of it."""

NOT_MEASURED = "not measured"
"""What a formula begins with where there is none, because D could not be measured."""

UNKNOWN = "Its denominator is not known: audit it again in float32 or float64."

CONSEQUENCES = {
    "notes": "Over G microbatches it accumulates 1/G of the mean of the microbatch sums: SGD needs G times the "
    "learning rate, and AdamW hides it.",
    "microbatch_mean": "It accumulates the mean of the microbatch sums: the gradient grows with the tokens in a "
    "microbatch, and the learning rate has to absorb that.",
    "sequence_mean": "It accumulates the mean over all sequences while every microbatch has the same number of them; "
    "long responses weigh more than short ones.",
    "microbatch_token_mean": "It accumulates a mean of means: tokens of a microbatch with few response tokens weigh "
    "more, so the gradient changes with the split.",
    "sequence_token_mean": "Every sequence weighs the same, however long, so a token of a long response counts less; "
    "invariant to the split while all microbatches have the same number of sequences.",
    "token_mean": "It accumulates exactly the full batch's mean over response tokens, however the minibatch is split.",
}


TRAINED_ROWS = "B_r"
"""The symbol for sequences with response tokens, where a step counts those and not B."""


@dataclass(frozen=True)
class Known:
    """A rule that the audit knows by name: exponents of the counts without c, and whether c belongs to it."""

    powers: Mapping[str, int]
    uses_constant: bool

    @property
    def formula(self) -> str:
        return product_text(({"c": 1} if self.uses_constant else {}) | dict(self.powers))


def _known(rule: Rule) -> Known:
    symbols = [symbol for symbol in (rule.first, rule.second) if symbol != "1"]
    return Known({symbol: symbols.count(symbol) for symbol in symbols}, rule.uses_constant)


KNOWN: Mapping[str, Known] = MappingProxyType(
    {name: _known(rule) for name, rule in RULES.items()}
    | {"sequence_token_mean": Known({"n_b": 1, "B": 1, "G": 1}, uses_constant=False)}
)
"""The rules of `RULES`, and `sequence_token_mean`: each sequence by its own token count. Read-only."""


@dataclass(frozen=True, repr=False)
class StepAudit:
    """What `audit_step` found; printed, a readable report.

    Attributes:
        name: of the step.
        rule: the rule it implements, one of `RULES` or `sequence_token_mean`; None if it is none of them. c may be in
            it or not: at its default of 1 that is no difference.
        formula: the denominator that was measured, such as `c·G²`, in the symbols of `scaling.py` with T, the positions
            of a row, n_b, the response tokens of a sequence, and B_r, the sequences of a microbatch that have some,
            where they are counted in the place of B. Without its sign.
        problems: codes, in the order of `PROBLEMS`.
        details: for each code a sentence with what was measured.
        consequence: what the first problem does to training, and what the rule does, if the gradient is still its.
        calls: how often the step was called.
    """

    name: str
    rule: str | None
    formula: str
    problems: tuple[str, ...]
    details: Mapping[str, str] = field(hash=False)
    consequence: str
    calls: int

    @property
    def ok(self) -> bool:
        """No problem was found. Whether the rule is the one you want is another question: compare `rule`."""
        return not self.problems

    def as_dict(self) -> dict[str, object]:
        """The attributes and `ok` as JSON can hold them."""
        return {
            "name": self.name,
            "rule": self.rule,
            "formula": self.formula,
            "ok": self.ok,
            "problems": list(self.problems),
            "details": dict(self.details),
            "consequence": self.consequence,
            "calls": self.calls,
        }

    def __repr__(self) -> str:
        width = max(map(len, self.problems), default=0)
        lines = [f"  {code.ljust(width)}  {self.details[code]}" for code in self.problems]
        return "\n".join([self._title(), self._summary(), *lines, self.consequence])

    def _repr_html_(self) -> str:
        title, summary, *consequence = map(
            html.escape, [self._title(), self._summary(), *self.consequence.splitlines()]
        )
        rows = [(code, self.details[code]) for code in self.problems]
        return f"<p><strong>{title}</strong><br>{summary}</p>{table_html(rows)}<p>{'<br>'.join(consequence)}</p>"

    def _title(self) -> str:
        return f"{self.name}: {self.rule or 'no rule with a name'}, D = {self.formula}"

    def _summary(self) -> str:
        return counted(len(self.problems), self.calls, "call")


_CELL = 'style="text-align: left; vertical-align: top"'
_CODE = 'style="text-align: left; vertical-align: top; white-space: nowrap"'


def counted(problems: int, tries: int, what: str) -> str:
    """`2 problems found in 37 calls:`."""
    found = f"{problems or 'No'} problem{'' if problems == 1 else 's'} found"
    return f"{found} in {tries} {what}{'' if tries == 1 else 's'}{':' if problems else '.'}"


def table_html(rows: Iterable[tuple[str, str]]) -> str:
    """Codes and details as an HTML table, nothing where there are none."""
    cells = [(html.escape(code), html.escape(detail)) for code, detail in rows]
    body = "".join(f'<tr><th scope="row" {_CODE}>{code}</th><td {_CELL}>{detail}</td></tr>' for code, detail in cells)
    return f"<table><tbody>{body}</tbody></table>" if body else ""


def rule_of(powers: Mapping[str, Fraction], factor: float) -> str | None:
    """The name of the rule with these exponents, with or without c."""
    counts = {symbol: power for symbol, power in powers.items() if symbol != "c"}
    is_plain = factor == 1 and powers.get("c", 0) in (0, 1)
    return next((name for name, known in KNOWN.items() if is_plain and known.powers == counts), None)


def consequence_of(rule: str | None, problems: tuple[str, ...], formula: str) -> str:
    """What the gravest problem does to training; on a second line what the rule does, if the gradient is still its."""
    if problems[:1] == ("steps-ignored",) and formula == "c":
        return (
            "G microbatches accumulate G times too much, unless c is given as the response tokens of the whole "
            "minibatch: then this is token_mean."
        )
    does = CONSEQUENCES.get(rule, "") if _GRADIENT_AS_THE_RULE_SAYS.issuperset(problems) else ""
    if problems:
        return "\n".join(filter(None, [PROBLEMS[problems[0]], does]))
    if does:
        return does
    if formula.startswith(NOT_MEASURED):
        return UNKNOWN
    if TRAINED_ROWS in formula:
        return (
            f"{TRAINED_ROWS} are the sequences with response tokens: one without any is left out of the mean, so the "
            "others of its microbatch weigh more than those of a full one."
        )
    return (
        "No known rule divides like this: work out what its microbatches accumulate to before choosing a learning rate."
    )
