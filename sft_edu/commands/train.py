"""The command `sft-edu train`: what is asked for, what is refused, and what the exit status says."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from contextlib import nullcontext
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from sft_edu.commands.claim import LOCK, check_free, claim, is_restarted, resume_command
from sft_edu.commands.dry_run import describe_run
from sft_edu.commands.prepare_run import TINY, PreparedRun, prepare_run
from sft_edu.commands.run_results import final_words, how_far, save_final_model, write_report
from sft_edu.commands.run_settings import SETTINGS, RunSettings, read_settings
from sft_edu.commands.train_options import OPTION_NAMES, add_options
from sft_edu.digits import number_of
from sft_edu.ranks.torchrun import RankError, is_launched, ranks_from_environment
from sft_edu.training.checkpoint import DamagedCheckpointWarning
from sft_edu.training.one_process import OneProcess
from sft_edu.training.pretrained import ModelLoadError
from sft_edu.training.run import RunFolder, stops_on_interrupt, train_into
from sft_edu.training.train import OutOfMemory, is_out_of_memory

INTERRUPTED = 130  # what shells say of a program that Ctrl+C ended
_MAY_CHANGE = ("threads",)


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add the parser of `train` to those of the command."""
    parser = commands.add_parser(
        "train",
        help="train a model on the built-in tasks or on your own examples",
        description="Train a model on the built-in tasks, or on your own examples, and leave metrics, checkpoints, the "
        "model and a report in a folder. Ctrl+C stops after the microbatch and keeps everything.",
        epilog="torchrun --nproc-per-node 2 -m sft_edu train ... shares the work among two processes; the options say "
        "what all of them do together, and so the result is the same but for rounding. Exit status: 0 if the run is "
        "finished, 1 if it failed, 2 if it could not begin, 130 if Ctrl+C stopped it.",
        argument_default=argparse.SUPPRESS,  # what is not said here may stand in the folder of the run
    )
    add_options(parser)
    parser.set_defaults(run=_train)


class _Refused(Exception):
    """It cannot begin; the text says why."""


class _Failed(Exception):
    """It began, and did not get to the end; the text says why, and what to do."""


def _train(options: argparse.Namespace) -> int:
    missing = [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        return _say(f'sft-edu train needs {" and ".join(missing)}: pip install "sft-edu[train]"', 2)
    if options.shard and not is_launched():
        return _say("--shard: got it in one process; expected several, such as torchrun starts", 2)
    threads = torch.get_num_threads()
    try:
        with ranks_from_environment(shard=options.shard) as ranks:
            # A launcher that starts a run again does so with the words it was first started with.
            options.resume |= ranks.first(lambda: is_restarted(options.out))
            run = _prepare(options, ranks)
            if not options.dry_run:
                return _run(run, options)
            if ranks.rank == 0:
                print(describe_run(run, colour=_shows_colour()))
            return 0
    except _Refused as error:
        return _say(str(error), 2)
    except (_Failed, RankError) as error:
        return _say(str(error), 1)
    except KeyboardInterrupt:
        return _say(f"Stopped at once. What was saved before is in {options.out}.", INTERRUPTED)
    finally:
        torch.set_num_threads(threads)


def _prepare(options: argparse.Namespace, ranks: OneProcess) -> PreparedRun:
    names = {field.name for field in fields(RunSettings)}
    given = {name: value for name, value in vars(options).items() if name in names}
    try:
        settings = _resumed(options.out, given) if options.resume else RunSettings(**given)
        if not options.resume and not options.dry_run:
            check_free(options.out)
        prepared = prepare_run(settings, _device(options, ranks), ranks)
        if prepared.settings.threads is not None:
            torch.set_num_threads(prepared.settings.threads)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _Refused("The model does not fit into memory; take a smaller one or another --device.") from error
    except (ModelLoadError, OSError, TypeError, ValueError) as error:
        raise _Refused(_words(error)) from error
    found = {name: _absolute(name, getattr(prepared.settings, name)) for name in ("data", "model")}
    return replace(prepared, settings=replace(prepared.settings, **found, threads=torch.get_num_threads()))


def _device(options: argparse.Namespace, ranks: OneProcess) -> torch.device | str | None:
    name = getattr(options, "device", None)
    return ranks.device if ranks.device is not None and name in (None, "cuda") else name


def _resumed(folder: Path, given: dict[str, object]) -> RunSettings:
    """What the run in the folder was asked to do. The same may be said again, but nothing else."""
    if not (folder / SETTINGS).exists():
        raise ValueError(f"{folder}: holds no run to go on with; leave out --resume to begin one")
    stored = read_settings(folder)
    for name, value in given.items():
        began_with = getattr(stored, name)
        if _absolute(name, value) != began_with and name not in _MAY_CHANGE:
            option = OPTION_NAMES.get(name, "--" + name.replace("_", "-"))
            raise ValueError(f"{option}: got {value}; the run in {folder} began with {began_with}")
    return replace(stored, **{name: given[name] for name in _MAY_CHANGE if name in given})


def _run(prepared: PreparedRun, options: argparse.Namespace) -> int:
    folder = options.out
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        prepared.training.ranks.first(lambda: claim(folder, lock, prepared.settings, options.resume))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DamagedCheckpointWarning)
            run = RunFolder(folder, prepared.training, resume=options.resume)
        for warning in caught:
            _say(str(warning.message), 0)
        if options.resume and prepared.training.ranks.rank == 0:
            _say(_where_it_stands(run), 0)
        return _train_to_the_end(prepared, run, resume_command(folder, shard=options.shard))
    except Timeout as error:
        raise _Refused(f"{folder}: another process trains in it; wait for it, or take another folder: --out") from error
    except (OSError, ValueError) as error:
        raise _Refused(_words(error)) from error
    finally:
        lock.release()


def _where_it_stands(run: RunFolder) -> str:
    if run.training.finished:
        return f"Already finished, {run.training.step:,} of {run.training.num_steps:,} steps."
    words = f"Goes on from the last checkpoint, {how_far(run.training)}"
    if run.steps_again == 1:
        return f"{words}; a step that came after it is done again."
    return words + f"; {run.steps_again:,} steps that came after it are done again" * bool(run.steps_again) + "."


def _train_to_the_end(prepared: PreparedRun, run: RunFolder, go_on: str) -> int:
    from sft_edu.commands.progress_bar import progress_bar

    ranks, settings = run.training.ranks, prepared.settings
    is_first = ranks.rank == 0
    if run.differences and is_first:
        _say(f"Not bit for bit as if it had never stopped: {'; '.join(run.differences)}.", 0)
    if is_first:
        print(f"{prepared.examples}\n{prepared.split}.\n{_size(prepared)}", flush=True)
    try:
        with stops_on_interrupt() as asked, progress_bar(run.training) if is_first else nullcontext() as on_line:
            finished = train_into(
                run,
                checkpoint_every=settings.checkpoint_every,
                evaluate=prepared.evaluation,
                evaluate_every=settings.evaluate_every,
                on_line=on_line,
                should_stop=asked,
            )
        ranks.make_whole(run.training.model)
        ranks.first(lambda: _leave(prepared, run, go_on))  # all wait: when one ends, a launcher ends the others
        return 0 if finished else INTERRUPTED
    except OSError as error:
        words = f"{_failed(run)} {_words(error)}\nWhat was saved before is whole: {go_on}"
        raise _Failed(words) from error
    except (ValueError, RuntimeError, MemoryError) as error:
        words, is_of_all = _told(error, run)
        if is_of_all:  # otherwise the others do not know of it, and nobody may wait
            words.append(f"Report: {ranks.first(lambda: write_report(prepared, run, words))}")
        elif is_first:
            words.append(f"Report: {write_report(prepared, run, words)}")
        raise _Failed("\n".join(words)) from error


def _told(error: Exception, run: RunFolder) -> tuple[list[str], bool]:
    """What failed and what to do, and whether all ranks failed with it. An error of another kind is raised again."""
    begin_anew = "begin anew in another folder: --out"
    if isinstance(error, OutOfMemory):
        return [f"{_failed(run)} {_words(error)}", f"With other settings, {begin_anew}"], False
    if is_out_of_memory(error):
        step, total, device = run.training.step, run.training.num_steps, run.training.device
        what = f"Too little memory on {device} for what comes after it, such as an evaluation."
        advice = f"Take a smaller --microbatch-size or --max-length; {begin_anew}"
        return [f"Failed after optimizer step {step} of {total}. {what}", advice], False
    is_of_all = isinstance(error, RuntimeError) or str(error).startswith("rank ")
    if isinstance(error, RuntimeError) and "non-finite" not in str(error):
        raise error
    return [
        f"{_failed(run)} {_words(error)}",
        f"A lower --learning-rate or --max-norm may help; {begin_anew}",
    ], is_of_all


def _leave(prepared: PreparedRun, run: RunFolder, go_on: str) -> None:
    """Write what is left of a run that is finished or stopped, and say so."""
    finished = run.training.finished
    model = save_final_model(prepared, run.folder) if finished else None
    words = final_words(prepared, run, model) + [f"Go on with: {go_on}"] * (not finished)
    print(*words, f"Report: {write_report(prepared, run, words)}", sep="\n")


def _failed(run: RunFolder) -> str:
    return f"Failed at optimizer step {run.training.step + 1} of {run.training.num_steps}."


def _size(prepared: PreparedRun) -> str:
    training, config = prepared.training, prepared.training.config
    shared = training.ranks.note(config.gradient_accumulation_steps)
    there_are = len(training.examples)
    here = f" at most, here {there_are}" * (there_are < training.minibatch_size)
    return (
        f"{config.microbatch_size} x {config.gradient_accumulation_steps} = {training.minibatch_size} sequences in an "
        f"optimizer step{here}, {number_of(training.num_steps, 'step')}, {config.rule}, on {training.device}{shared}."
    )


def _words(error: BaseException) -> str:
    """The text of an error, with options in the place of the names of settings."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    known = {field.name for field in fields(RunSettings)} | {"device"}

    def as_option(name: re.Match) -> str:
        return OPTION_NAMES.get(name[1], "--" + name[1].replace("_", "-")) + name[2] if name[1] in known else name[0]

    return re.sub(r"(?<![\w-])(\w+)(: got|:? \d)", as_option, str(error)) or type(error).__name__


def _absolute(name: str, value: object) -> object:
    """A setting; a path in it so that it leads to the same file from everywhere."""
    if name not in ("data", "model") or value in (None, TINY):
        return value
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


def _shows_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _say(text: str, status: int) -> int:
    rank = os.environ.get("RANK", "0")
    print(text if rank == "0" else f"[rank {rank}] {text}", file=sys.stderr)
    return status
