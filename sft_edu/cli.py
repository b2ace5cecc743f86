"""The command `sft-edu`.

Each subcommand is one function that adds its parser and names the function that runs it; `main` knows no more of them.
Exit status: 0 as hoped, 1 not, 2 could not be tried.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from sft_edu.audit import audit_step
from sft_edu.audit.report import KNOWN, NOT_MEASURED, StepAudit
from sft_edu.commands.lab import add_lab
from sft_edu.commands.load_target import TargetError, target_function
from sft_edu.commands.train import add_train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Wrong usage ends in SystemExit(2), as argparse does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # formulas have signs that not every terminal can show
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="sft-edu", description="Instruments for the SFT microbatch step.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


def _add_audit(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "audit",
        help="say which scaling rule a microbatch step implements",
        description="Call a microbatch step with small inputs, and say which scaling rule it implements and what is "
        "wrong with it.",
        epilog="Exit status: 0 if no problem is found, the denominator is measured, and the rule is the expected one; "
        "1 if not; 2 if it cannot be loaded.",
    )
    parser.add_argument("target", help="path/to/file.py:function or package.module:function")
    parser.add_argument("--expect", metavar="RULE", choices=tuple(KNOWN), help=f"one of {', '.join(KNOWN)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> int:
    try:
        with target_function(options.target) as step:
            audit = audit_step(step)
    except TargetError as error:
        print(error, file=sys.stderr)
        return 2
    is_measured = not audit.formula.startswith(NOT_MEASURED)
    met = audit.ok and is_measured and options.expect in (None, audit.rule)
    if options.json:
        given = {"target": options.target, "expected": options.expect, "met": met}
        print(json.dumps(given | audit.as_dict(), indent=2))
    else:
        print(audit)
        if not met:
            print(_unmet(audit, options.expect))
    return 0 if met else 1


def _unmet(audit: StepAudit, expected: str | None) -> str:
    wanted = "no problems" if audit.problems else "a denominator that can be measured"
    if expected:
        wanted = f"{expected}, D = {KNOWN[expected].formula}, without problems"
    return f"Expected {wanted}."


_COMMANDS = (add_lab, add_train, _add_audit)
