"""From text to tokens, labels and a response mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sft_edu.data.encode import Encoded, collate, padding_token


class Tokenizer(Protocol):
    """What this package asks of a tokenizer. Every Hugging Face tokenizer satisfies it, and so does `ByteTokenizer`."""

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One token per UTF-8 byte, ids 0 to 255, and three special tokens: pad 256, bos 257, eos 258.

    Nothing is unknown to it and nothing has to be downloaded.
    """

    pad_token_id = 256
    bos_token_id = 257
    eos_token_id = 258

    def __len__(self) -> int:
        return 259

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The bytes of the text, between bos and eos when `add_special_tokens`."""
        # surrogatepass: half of a broken emoji is a legal Python string, and must not stop a training run.
        ids = list(text.encode("utf-8", errors="surrogatepass"))
        return [self.bos_token_id, *ids, self.eos_token_id] if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the bytes; special tokens have none, and bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(token) for token in token_ids if token < 256).decode("utf-8", errors="replace")


def tokenize_prompt_and_output(
    prompts: Sequence[str], outputs: Sequence[str], tokenizer: Tokenizer, *, append_eos: bool = False
) -> dict[str, torch.Tensor]:
    """Tokenize prompts and outputs, join each pair, and shift the labels by one.

    The joined sequences are padded on the right to the longest. `input_ids` is all but the last position and `labels`
    all but the first, so `labels[b, t]` is the token that comes after `input_ids[b, t]`. The mask lies on the labels:
    1 where the label is a token of the output, 0 where it is a token of the prompt or padding.

    Prompt and output are tokenized apart, without special tokens, so that the border between them is exact. An output
    whose prompt is empty loses its first token: nothing comes before it to predict it from.

    Args:
        prompts: B strings.
        outputs: B strings.
        tokenizer: see `Tokenizer`. One without a pad token pads with eos, or with 0; the mask is 0 there.
        append_eos: end each output with `tokenizer.eos_token_id`, which then is a response token like the others.

    Returns:
        `input_ids` and `labels`, int64, and `response_mask`, bool, each `[B, longest - 1]`, on the CPU.

    Raises:
        TypeError: prompts or outputs is one string, or holds something else than strings.
        ValueError: their numbers differ, there are none, no pair has two tokens, or there is no eos to append.

    Source:
        Stanford CS336, assignment 5 (alignment), `tokenize_prompt_and_output`.
    """
    for name, texts in (("prompts", prompts), ("outputs", outputs)):
        if isinstance(texts, str) or not hasattr(texts, "__len__") or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"{name}: got {type(texts).__name__} {texts!r:.60}; expected a list of strings")
    if len(prompts) != len(outputs) or not prompts:
        raise ValueError(
            f"prompts and outputs: got {len(prompts)} and {len(outputs)} strings; expected one output for each prompt, "
            "at least one"
        )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if append_eos and not end:
        raise ValueError("append_eos: got True; expected False, because the tokenizer has no eos token")
    pairs = [
        (
            tokenizer.encode(prompt, add_special_tokens=False),
            tokenizer.encode(output, add_special_tokens=False) + (end if append_eos else []),
        )
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    if max(len(prompt) + len(output) for prompt, output in pairs) < 2:
        raise ValueError("prompts and outputs: got no pair with two tokens; expected one token to predict another from")
    sequences = [
        Encoded((*prompt, *output), (False,) * len(prompt) + (True,) * len(output)) for prompt, output in pairs
    ]
    return collate(sequences, padding_token(tokenizer))


_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def visible_token(token_id: int | torch.Tensor, tokenizer: Tokenizer) -> str:
    """The text of one token with nothing invisible in it: `␣` for a space, `⏎` for a newline, `<eos>`, `<pad>`.

    A token that is only a part of a character, as one byte may be, is shown as `x` and its id in hexadecimal.

    Args:
        token_id: one id, a number or a tensor with one element.
        tokenizer: the one that made it.
    """
    token_id = int(token_id)
    # Where one token serves as several, it is what a response ends with.
    specials = {getattr(tokenizer, "bos_token_id", None): "<bos>", tokenizer.pad_token_id: "<pad>"}
    specials[tokenizer.eos_token_id] = "<eos>"
    if token_id in specials:
        return specials[token_id]
    text = tokenizer.decode([token_id])
    if not text or "\ufffd" in text:
        return f"x{token_id:02x}"
    return visible_text(text)


def visible_text(text: str) -> str:
    """A text on one line with nothing invisible in it, as in `visible_token`."""
    return "".join(_VISIBLE.get(c, c if c.isprintable() else f"x{ord(c):02x}") for c in text)
