"""A response mask on real sentences: the right one, six wrong ones, and any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import ipywidgets
import torch

from sft_edu.log_probs import get_response_log_probs
from sft_edu.masks import PRESETS
from sft_edu.model import TinyLM
from sft_edu.tokens import ByteTokenizer, Tokenizer, tokenize_prompt_and_output, visible_token
from sft_edu.widgets import state
from sft_edu.widgets.lab import labelled, one_of
from sft_edu.widgets.microbatch_lab import MicrobatchLab, as_matrix

_PROMPTS, _OUTPUTS = ("Capital of Peru? ", "2+2? "), ("Lima", "4")
_OTHER = "painted by hand"


class MaskLab(MicrobatchLab):
    """Sentences as tokens, scored by a model, under a mask to paint. G = 1, c = 1.

    Choose a preset by hand or from code: `lab.preset = "one too late"; lab`.

    Args:
        prompts: B strings.
        outputs: B strings; each ends with eos.
        model: scores the tokens; an untrained `TinyLM` by default.
        tokenizer: `ByteTokenizer` by default.
    """

    SETTINGS: ClassVar = {"mask": ("mask", state.MASK)}

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
        correct = batch["response_mask"]
        self._presets = {name: as_matrix(preset.make(correct).int()) for name, preset in PRESETS.items()}
        self._chosen = "correct"
        tokens = [[visible_token(token, tokenizer) for token in row] for row in batch["labels"].tolist()]
        super().__init__(log_probs, correct, tokens)

    @property
    def preset(self) -> str:
        """The name of the mask; of two names for the same mask, the one that was chosen."""
        names = [name for name, mask in self._presets.items() if mask == self.mask]
        return self._chosen if self._chosen in names else (names or [_OTHER])[0]

    @preset.setter
    def preset(self, name: str) -> None:
        self._chosen = one_of("preset", name, (*PRESETS, _OTHER))
        self._apply({"mask": self._presets.get(name, self.mask)})

    def _make(self) -> list[ipywidgets.Widget]:
        views = super()._make()
        choice = ipywidgets.Dropdown(options=[*PRESETS, _OTHER], **labelled("mask", "a mask by name", "230px"))
        self._control("preset", choice)
        return views

    def numbers(self) -> list[str]:
        return [f"This mask: {self.preset}.", *super().numbers()]

    def words(self) -> str:
        wrong = self._tokens_where(lambda mine, right: mine > right)
        missing = self._tokens_where(lambda mine, right: mine < right)
        preset = PRESETS.get(self.preset)
        consequence = preset.consequence if preset else "A mask of your own."
        return (
            f"{consequence} Trained though they are not response: {wrong or 'none'}. "
            f"Response tokens left out: {missing or 'none'}."
        )

    def _tokens_where(self, condition: Callable[[int, int], bool]) -> str:
        rows = zip(self._tokens, self.mask, self._presets["correct"], strict=True)
        found = [token for row in rows for token, mine, right in zip(*row, strict=True) if condition(mine, right)]
        return " ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
