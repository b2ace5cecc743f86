"""The steps of a computation as a chain of boxes that the page keeps up to date."""

from __future__ import annotations

import traitlets
from ipywidgets import widget_serialization

from sft_edu.widgets.live_view import LiveView, records, text, texts, wrong
from sft_edu.widgets.page import page_text

_KEYS = dict.fromkeys(("step", "name", "symbolic", "numeric", "value"), text)


class StageChain(LiveView):
    """Steps from left to right, each with its formula, the formula with numbers put in, and its value.

    Press a step to select it, again to let go; arrow keys move between steps.

    Args:
        stages: dicts of texts: step (its number), name, symbolic (the formula), numeric (the formula with numbers) and
            value. Names are all different. A formula or value may be empty.
        selected: the name of a stage, or "". It follows the hand, so `observe` it to give `detail`.
        detail: lines about the selected stage. When a hand selects another one, the page hides them until the observers
            of `selected` have run.
        words: a sentence or two on what the chain shows, read out once they have stopped changing.
        ahead: None, or what the page needs to draw the numbers of a `StepLab` before the kernel has computed them (see
            `step_ahead.py`). Such numbers are marked until the kernel's own have come.
        inputs: with `ahead`, what `stages` were computed from: steps, constant, rule, mask and log_probs. Set it in the
            same message as `stages`, and before the controls: it tells an answer from one that a hand has overtaken.
    """

    _esm = page_text("view.js", "step_ahead.js", "inputs_ahead.js", "stage_chain.js")
    _css = page_text("view.css", "stage_chain.css")
    stages = traitlets.List().tag(sync=True)
    selected = traitlets.Unicode().tag(sync=True)
    detail = traitlets.List().tag(sync=True)
    words = traitlets.Unicode().tag(sync=True)
    ahead = traitlets.Dict(default_value=None, allow_none=True).tag(sync=True, **widget_serialization)
    inputs = traitlets.Dict().tag(sync=True)
    _answered = traitlets.Unicode().tag(sync=True)  # the selection that `detail` is about
    _asked = False

    def set_state(self, sync_data: dict) -> None:
        """Take what a page sends. A selection that is refused goes back as it was."""
        self._asked = True
        try:
            super().set_state(sync_data)
        finally:
            self._asked = False
            self._answered = self.selected
            if sync_data.get("selected", self.selected) != self.selected:
                self.send_state("selected")

    @traitlets.validate("stages")
    def _check_stages(self, proposal) -> list[dict[str, str]]:
        stages = records("stages", proposal["value"], _KEYS, {})
        names = [stage["name"] for stage in stages]
        if "" in names or len(set(names)) < len(names):
            raise wrong("stages", names, "names that are all different and not empty")
        return stages

    @traitlets.observe("stages")
    def _let_go(self, change) -> None:
        if self.selected not in self._names():
            self.selected = ""

    @traitlets.observe("selected")
    def _answer(self, change) -> None:
        if not self._asked:
            self._answered = self.selected

    @traitlets.validate("selected")
    def _check_selected(self, proposal) -> str:
        if proposal["value"] not in ("", *self._names()):
            raise wrong("selected", proposal["value"], f"'' or one of {', '.join(self._names())}")
        return proposal["value"]

    @traitlets.validate("detail")
    def _check_detail(self, proposal) -> list[str]:
        return texts("detail", proposal["value"])

    @traitlets.validate("words")
    def _check_words(self, proposal) -> str:
        return text("words", proposal["value"])

    def _names(self) -> list[str]:
        return [stage["name"] for stage in self.stages]

    def __repr__(self) -> str:
        lines = [f"StageChain(selected={self.selected!r})"]
        for stage in self.stages:
            formulas = " = ".join(filter(None, (stage["symbolic"], stage["numeric"])))
            lines.append(f"{stage['step']} {stage['name']}: {' -> '.join(filter(None, (formulas, stage['value'])))}")
            lines += [f"    {line}" for line in self.detail if stage["name"] == self.selected]
        return "\n".join([*lines, *filter(None, [self.words])])
