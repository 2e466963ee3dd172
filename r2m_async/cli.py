"""`r2m init | train | plan | check | config | watch | samples | report | export | study | reward-model | policy-states | bon | eval`: the command line.

r2m init --policy embedded --reward embedded --cpu --out first.yaml
r2m train configs/quickstart.yaml run.num_steps=20
r2m plan  configs/quickstart.yaml --times runs/r2m-20260101-120000
r2m check configs/presets/dialogue_qwen2.5_3b.yaml
r2m config --explain scheduling.max_policy_age
r2m watch runs/r2m-20260101-120000
r2m samples runs/r2m-20260101-120000
r2m report runs/r2m-20260101-120000 runs/vanilla-20260101-130000 --out report.html
r2m export runs/r2m-20260101-120000 exported
r2m study configs/studies/variants.yaml studies/variants
r2m reward-model train configs/reward_model/bsr.yaml run.seed=1
r2m reward-model resume runs/bsr-20260101-120000
r2m reward-model eval runs/bsr-20260101-120000 --rm-bench rm_bench.jsonl
r2m policy-states exported --pairs pairs.jsonl --later exported-later
r2m bon runs/bt-20260101-120000 runs/bsr-20260101-120000
r2m eval generate exported --prompts alpaca_eval.json --format alpaca_eval --out answers
r2m eval judge answers/model_outputs.json --judge runs/bsr-20260101-120000 --against other/model_outputs.json
r2m eval win-rate annotations.json
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from r2m_async.commands.answers import add_eval
from r2m_async.commands.best_of_n import add_best_of_n
from r2m_async.commands.config import add_config
from r2m_async.commands.export import add_export
from r2m_async.commands.init import add_init
from r2m_async.commands.policy_states import add_policy_states
from r2m_async.commands.report import add_report
from r2m_async.commands.results import document, only_to_stderr
from r2m_async.commands.reward_model import add_reward_model
from r2m_async.commands.ring import add_ring
from r2m_async.commands.samples import add_samples
from r2m_async.commands.study import add_study
from r2m_async.commands.watch import add_watch
from r2m_async.errors import (
    CodecError,
    ConfigError,
    DataError,
    DiskError,
    StageLost,
    StalledRun,
    StepFailed,
    WeightMismatch,
)
from r2m_async.interruption import Interrupted, interruptible
from r2m_async.standard_output import lost_output, open_what_is_closed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    The status is 0 if the command is done, 1 if it failed, and 2 for a mistake of the user's. It is 128 + n if signal n
    asked the command to leave. With every status but 0, one message on standard error says why. With `--json` standard
    output is one JSON document and nothing else (docs/failures.md).
    """
    # The user's own `module:attr` functions are looked for in the current folder, after everything that is installed.
    sys.path.append(os.getcwd())
    if "--json" not in (sys.argv[1:] if arguments is None else arguments):
        return _run(_parsed(arguments))[0]
    with only_to_stderr():
        try:
            status, told = _run(_parsed(arguments))
        except _Unreadable as error:
            status, told = 2, error.message
        except Exception as error:
            traceback.print_exc()
            status, told = 1, f"{type(error).__name__}: {error}"
    # Under torchrun one document, not one a rank.
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0":
        try:
            print(document(status, told), flush=True)
        except OSError as error:
            status, _ = _tell_lost(lost_output(error) or error, argparse.Namespace())
    return status


def _run(parsed: argparse.Namespace) -> tuple[int, dict[str, Any] | str]:
    """Runs a command that was parsed. Returns its exit status, and its result or the message that says why it failed."""
    try:
        with interruptible():
            done = parsed.command(parsed)
            if lost := lost_output():
                return _tell_lost(lost, parsed)
            return done if isinstance(done, tuple) else (0, done)
    except OSError as error:
        if not (lost := lost_output(error)):
            raise
        return _tell_lost(lost, parsed)
    except (ConfigError, DataError) as error:
        return _tell(error, 2, error, parsed)
    except (StageLost, StalledRun, StepFailed, WeightMismatch, CodecError, DiskError) as error:
        # The commands that begin or go on with a run take overrides; what ended is a run in these alone.
        return _tell(f"the run ended: {error}" if hasattr(parsed, "overrides") else error, 1, error, parsed)
    except Interrupted as error:
        return _tell(error, error.status, error, parsed)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line. Overrides (`section.key=value`) may stand anywhere.

    argparse itself takes no positional argument behind an option, so what it leaves over is looked through here.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        from r2m_async.commands.completion import complete

        complete(parser)
    parsed, rest = parser.parse_known_args(arguments)
    late = [one for one in rest if hasattr(parsed, "overrides") and "=" in one and not one.startswith("-")]
    if len(late) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(one for one in rest if one not in late)}")
    if late:
        parsed.overrides = [*parsed.overrides, *late]
    return parsed


def _tell(what: object, status: int, error: BaseException, parsed: argparse.Namespace) -> tuple[int, str]:
    if getattr(parsed, "traceback", False):
        traceback.print_exception(error)
    message = "\n".join([str(what), *getattr(error, "__notes__", ())])
    with contextlib.suppress(OSError):  # whoever read standard error may have left, too
        print(f"r2m: {message}", file=sys.stderr)
    return status, message


def _tell_lost(error: OSError, parsed: argparse.Namespace) -> tuple[int, str]:
    """Returns the status of a command whose output could not be written, and the message."""
    if error.errno == errno.EPIPE:  # as of `| head`: the status is that of a program which this ends
        return 128 + signal.SIGPIPE, "standard output was closed before all of it was read"
    return _tell(f"standard output: cannot be written: {error.strerror}", 1, error, parsed)


def entry() -> None:
    """Runs `main` and ends the process with its status.

    If Ray or a tracker had to be given up, its threads would keep Python from ending. Then the process ends without waiting
    for them.
    """
    open_what_is_closed()
    try:
        status = main()
    except Exception:
        # No message was written for this error, so its whole traceback is shown.
        traceback.print_exc()
        status = 1
    left_behind = [sys.modules.get(f"r2m_async.{name}") for name in ("launch.ray_connection", "runs.trackers")]
    if any(module is not None and module.abandoned.is_set() for module in left_behind):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class _Unreadable(SystemExit):
    """The arguments cannot be read. The usage and the message have been shown."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class _Parser(argparse.ArgumentParser):
    """A parser with the options of all commands. argparse makes the parsers of the commands of the same class."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        text = "show where an error arose, also where a message says all that a user needs"
        self.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=text)
        text = "print the result as one JSON document; everything else goes to standard error"
        self.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=text)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuses a value, such as a command, that is none of its choices, and names the nearest one."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            close = difflib.get_close_matches(str(value), map(str, action.choices or ()), n=1)
            remedy = f"; did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentError(action, f"{error.message}{remedy}") from None

    def error(self, message: str) -> NoReturn:
        """Shows the usage and the message, and leaves."""
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise _Unreadable(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="r2m", description="RLHF with a reward model that keeps learning.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # In the order in which `r2m --help` lists them.
    for add in (
        add_init,
        add_ring,
        add_config,
        add_watch,
        add_samples,
        add_report,
        add_export,
        add_study,
        add_reward_model,
        add_policy_states,
        add_best_of_n,
        add_eval,
    ):
        add(commands)
    return parser


if __name__ == "__main__":
    entry()
