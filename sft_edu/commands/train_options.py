"""What can be said to `sft-edu train`. The names are those of `RunSettings`, but for two."""

from __future__ import annotations

import argparse
from pathlib import Path

from sft_edu.scaling import RULES
from sft_edu.training.train_config import OPTIMIZERS

OPTION_NAMES = {"num_epochs": "--epochs", "chat_template": "--no-chat-template"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them in groups. What is not said has no value; it is decided by `prepare_run`, or stands in the folder."""
    group = parser.add_argument_group("what to train on")
    group.add_argument("--data", metavar="FILE", help="one JSON object on each line (default: the built-in tasks)")
    group.add_argument(
        "--held-out", type=float, metavar="SHARE", help="of the data, to be asked and not trained on (default: 0.1)"
    )
    group.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="longer examples lose their first tokens, and are counted"
    )
    group.add_argument(
        "--no-chat-template",
        action="store_false",
        dest="chat_template",
        help="leave out the model's chat template: the prompts are already written as the model is to see them",
    )
    group = parser.add_argument_group("what to train")
    group.add_argument("--model", help="tiny, a folder, or the id of a model on the hub (default: tiny)")
    group.add_argument("--device", help="such as cuda or cpu (default: the accelerator if there is one)")
    group.add_argument(
        "--shard",
        action="store_true",
        default=False,
        help="under torchrun: divide the model among the processes (FSDP), for one that is too large for each of them",
    )
    group.add_argument("--threads", type=int, help="how many PyTorch uses on the CPU")
    group = parser.add_argument_group("how (defaults for the tiny model; others take B = 4, G = 8 and LR = 2e-5)")
    group.add_argument("--rule", choices=tuple(RULES), help="what the loss is divided by (default: token_mean)")
    group.add_argument("--microbatch-size", type=int, metavar="B", help="sequences in one forward (default: 16)")
    group.add_argument(
        "--gradient-accumulation-steps", type=int, metavar="G", help="microbatches in an optimizer step (default: 4)"
    )
    group.add_argument(
        "--normalize-constant",
        type=float,
        metavar="C",
        help="c, a factor of the denominator in rules that have it (default: 1)",
    )
    group.add_argument(
        "--epochs",
        type=int,
        dest="num_epochs",
        metavar="N",
        help="how often each example is seen (default: 3, of the built-in tasks 1)",
    )
    group.add_argument("--optimizer", choices=OPTIMIZERS, help="what turns the gradient into a step (default: adamw)")
    group.add_argument("--learning-rate", type=float, metavar="LR", help="its highest value (default: 3e-3)")
    group.add_argument(
        "--warmup-steps",
        type=int,
        metavar="N",
        help="steps in which the rate rises to LR (default: a tenth, at most 50)",
    )
    group.add_argument("--weight-decay", type=float, metavar="W", help="of the weights, in each step (default: 0.01)")
    group.add_argument(
        "--max-norm", type=float, metavar="L", help="a longer gradient is cut to it; inf never clips (default: 1)"
    )
    group.add_argument("--seed", type=int, help="of the order, the tiny model and what is held out (default: 0)")
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--out",
        type=Path,
        default=Path("run"),
        metavar="FOLDER",
        help="where all that the run leaves is written (default: run)",
    )
    group.add_argument(
        "--evaluate-every",
        type=int,
        metavar="STEPS",
        help="from one test with the held-out examples to the next (default: a tenth of the run)",
    )
    group.add_argument(
        "--checkpoint-every", type=int, metavar="STEPS", help="from one checkpoint to the next (default: 50)"
    )
    group.add_argument("--resume", action="store_true", default=False, help="go on with the run in the folder")
    group.add_argument(
        "--dry-run", action="store_true", default=False, help="show the first batch and its size, and write nothing"
    )
