"""Real models: a Hugging Face causal language model and its tokenizer, from a folder or from the hub, and back.

Needs the extra `hf`. Nothing is imported from it before a model is asked for.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sft_edu.model import default_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PROBE = 8  # tokens


class ModelLoadError(Exception):
    """The model cannot be had; the text says why, for people."""


def load_model(
    name_or_path: str | os.PathLike, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to be trained.

    What has been downloaded before is taken from the disk without asking the hub. Code that a model brings along is
    never run.

    The model is in eval mode, so that nothing is dropped at random: only then do G microbatches give the gradient of
    the full batch. All its weights are trained.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, or the id of a model on the Hugging Face hub.
        device: where it goes; the accelerator if there is one, else the CPU.
        dtype: of the weights, whatever they were stored in. float32 also on an accelerator, where `Training` computes
            in bfloat16 all the same: a bfloat16 weight loses updates smaller than 1/256 of it.

    Returns:
        The model, whose `model(input_ids).logits` are `[B, T, V]`, and a tokenizer with an eos token. It may have no
        pad token; `padding_token` knows what to use.

    Raises:
        TypeError: the name is no text or path, or the dtype is not one of floats.
        ModelLoadError: transformers is not installed; the model cannot be found or read, weights are missing, it is
            not a causal language model, or model and tokenizer do not fit. The text says what to do.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype!r}; expected a torch.dtype of floats")
    name = _checked_name(name_or_path)
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModelLoadError(f'{name}: real models need transformers: pip install "sft-edu[hf]"') from error
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, report = _load("model", name, load, dtype=dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ModelLoadError(f"{name}: has no weights for {missing[0]}{more}; expected a whole causal language model")
    tokenizer = _load("tokenizer", name, transformers.AutoTokenizer.from_pretrained)
    _check_tokenizer(name, tokenizer, model)
    model.to(device if device is not None else default_device()).eval().requires_grad_(True)
    _check_causal(name, model)
    return model, tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> Path:
    """Write model and tokenizer into a new folder, in their own format: `load_model` and every other tool reads it.

    They are written beside it under another name first, so that the folder is either whole or not there.

    Args:
        model: of the class that `load_model` returns.
        tokenizer: its tokenizer.
        folder: must not exist; the folders above it are made if missing.

    Returns:
        The path of the folder.

    Raises:
        TypeError: the model cannot write itself.
        FileExistsError: the folder is there already; nothing was written.
        OSError: it could not be written; what was begun is removed.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"model: got {type(model).__name__}; expected a Hugging Face model")
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder}: is there already; take another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}."
    for left in folder.parent.glob(f"{glob.escape(prefix)}*.unfinished"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=".unfinished", dir=folder.parent) as place:
        unfinished = Path(place) / folder.name
        _write(model, tokenizer, unfinished)
        _flush(unfinished)
        unfinished.rename(folder)
    _flush(folder.parent, recursive=False)
    return folder


def context_length(model: nn.Module) -> int | None:
    """The longest input that a model reads, in tokens. None if it names no limit.

    A sequence may be one token longer: its last token is only a label, never an input.
    """
    if hasattr(model, "context_length"):
        return model.context_length
    config = getattr(model, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_positions"))
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def _checked_name(name_or_path: str | os.PathLike) -> str:
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"name_or_path: got {name_or_path!r}; expected a folder or the id of a model")
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"{name}: has no config.json; expected a folder that save_pretrained wrote")
        return str(path)
    if path.is_file():
        raise ModelLoadError(f"{name}: is a file; expected the folder with the model, its config and its tokenizer")
    if not _HUB_ID.fullmatch(name):
        raise ModelLoadError(f"{name!r}: there is no such folder, and the id of a model looks like owner/model")
    return name


def _load(what: str, name: str, from_pretrained: Callable, **options: object) -> Any:
    # By default whoever sits at the terminal is asked whether code that comes along may run.
    options["trust_remote_code"] = False
    if not Path(name).is_dir():
        with suppress(Exception):  # not downloaded yet, or not all of it
            return from_pretrained(name, local_files_only=True, **options)
    try:
        return from_pretrained(name, **options)
    except Exception as error:  # the libraries below have no common class for what can go wrong
        raise ModelLoadError(f"{name}: {_reason(what, name, error)}") from error


def _reason(what: str, name: str, error: BaseException) -> str:
    """Why it could not be loaded, and what to do."""
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    if any(isinstance(one, errors.GatedRepoError) for one in chain):
        return f"needs permission: ask for it on https://huggingface.co/{name}, then log in with `hf auth login`"
    if any(isinstance(one, errors.RepositoryNotFoundError) for one in chain):
        return (
            "there is no such folder, and no such model on the hub that may be read without a login (`hf auth login`)"
        )
    if any(isinstance(one, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) for one in chain):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return (
            f"there is no such folder, it has not been downloaded before, and {why}. Where there is a network run "
            f"`hf download {name}`, or take the path of a folder with the model"
        )
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is not run here; expected a model that transformers itself contains"
    return f"its {what} cannot be loaded: {shorten(str(error) or type(error).__name__, 300)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Give it the eos token that the model knows, if it has none of its own; refuse one that does not fit."""
    if tokenizer.eos_token_id is None:
        known = getattr(model.generation_config, "eos_token_id", None)
        known = known[0] if isinstance(known, list) else known
        tokenizer.eos_token = None if known is None else tokenizer.convert_ids_to_tokens(known)
    if tokenizer.eos_token_id is None:
        raise ModelLoadError(f"{name}: its tokenizer has no eos token; name one in tokenizer_config.json")
    known, given = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if given > known:
        raise ModelLoadError(f"{name}: its tokenizer has {given:,} tokens and the model only {known:,}")


@torch.no_grad()
def _check_causal(name: str, model: nn.Module) -> None:
    """Refuse a model that sees the token it is to predict, as an encoder does: it would learn to copy it."""
    ids = torch.ones(1, _PROBE, dtype=torch.int64, device=model.device)
    before = model(ids).logits[:, :-1]
    ids[:, -1] = 0
    after = model(ids).logits[:, :-1]
    # A causal model computes the same twice, up to the order in which experts are batched.
    if (before - after).abs().max() > torch.finfo(before.dtype).eps ** 0.5 * before.abs().max():
        raise ModelLoadError(f"{name}: a token changes the logits before it; expected a causal language model")


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # its word for a full disk
        raise OSError(f"{folder.name}: the weights could not be written: {error}") from error


def _flush(folder: Path, *, recursive: bool = True) -> None:
    """Have the disk hold what was written, before the name says that it is there."""
    for path in [*(folder.rglob("*") if recursive else ()), folder]:
        with suppress(PermissionError):  # Windows opens no folders
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
