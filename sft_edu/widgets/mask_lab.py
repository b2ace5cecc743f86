"""A response mask on real sentences: the right one, six wrong ones, and any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ipywidgets
import torch
import traitlets

from sft_edu.log_probs import get_response_log_probs
from sft_edu.masks import PRESETS, token_roles
from sft_edu.model import TinyLM
from sft_edu.tokens import ByteTokenizer, Tokenizer, tokenize_prompt_and_output, visible_token
from sft_edu.widgets.lab import Lab, as_tuples, labelled

_PROMPTS, _OUTPUTS = ("Capital of Peru? ", "2+2? "), ("Lima", "4")
_OTHER = "painted by hand"


class MaskLab(Lab):
    """Sentences as tokens, scored by a model, under a mask that can be switched token by token. G = 1, c = 1.

    Choose a preset by hand or from code: `lab.preset = "one too late"; lab`.

    Args:
        prompts: B strings.
        outputs: B strings; each ends with eos.
        model: scores the tokens; an untrained `TinyLM` by default.
        tokenizer: `ByteTokenizer` by default.
    """

    preset = traitlets.Unicode("correct")

    def __init__(
        self,
        prompts: Sequence[str] = _PROMPTS,
        outputs: Sequence[str] = _OUTPUTS,
        model: Callable[[torch.Tensor], object] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        tokenizer, model = tokenizer or ByteTokenizer(), model or TinyLM()
        batch = tokenize_prompt_and_output(prompts, outputs, tokenizer, append_eos=True)
        with torch.no_grad():
            log_probs = get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
        self._correct = batch["response_mask"]
        self._tokens = [[visible_token(token, tokenizer) for token in row] for row in batch["labels"].tolist()]
        super().__init__(log_probs, self._correct, token_roles(self._correct), self._tokens, preset="correct")

    def _add_controls(self) -> None:
        choice = ipywidgets.Dropdown(options=[*PRESETS, _OTHER], **labelled("mask", "a mask by name", "230px"))
        self._control("preset", choice)

    @traitlets.observe("preset")
    def _apply_preset(self, change) -> None:
        before = self.mask
        if self.preset != _OTHER:
            self.mask = as_tuples(PRESETS[self.preset].make(self._correct))
        if self.mask == before:
            self._refresh()  # another name for the same mask

    @traitlets.validate("preset")
    def _check_preset(self, proposal) -> str:
        if proposal["value"] not in (*PRESETS, _OTHER):
            raise traitlets.TraitError(f"preset: got {proposal['value']!r}; expected one of {', '.join(PRESETS)}")
        return proposal["value"]

    @traitlets.observe("mask")
    def _name_preset(self, change) -> None:
        self.preset = self._preset_name()

    def _preset_name(self) -> str:
        """Two presets can be the same mask: the chosen one goes first."""
        names = [name for name, preset in PRESETS.items() if as_tuples(preset.make(self._correct)) == self.mask]
        return self.preset if self.preset in names else (names or [_OTHER])[0]

    def _settings(self) -> str:
        return f"preset={self._preset_name()!r}"

    def _sentence(self) -> str:
        correct = as_tuples(self._correct)
        wrong = self._count(lambda row, column: self.mask[row][column] > correct[row][column])
        missing = self._count(lambda row, column: self.mask[row][column] < correct[row][column])
        name = self._preset_name()
        consequence = PRESETS[name].consequence if name in PRESETS else "A mask of your own."
        return (
            f"{consequence} Trained though they are not response: {wrong or 'none'}. "
            f"Response tokens left out: {missing or 'none'}."
        )

    def _count(self, condition: Callable[[int, int], bool]) -> str:
        found = [
            token
            for row, tokens in enumerate(self._tokens)
            for column, token in enumerate(tokens)
            if condition(row, column)
        ]
        return " ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
