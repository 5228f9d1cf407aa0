"""What every command shares: it prints in any terminal, and a user's mistake is a sentence and no traceback."""

import functools
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import RunStopped, UserError, in_one_line
from common.terminal import print_anywhere

AGAIN = "stopped at once; the same command goes on from the last recovery point"


def command(name: str, interrupted: str = "stopped") -> Callable[[Callable[[Sequence[str]], None]], "Main"]:
    """Decorates a command's main(arguments); it then gives the exit code, and says on stderr why it ended early.

    interrupted: what is said after Ctrl-C.
    """

    def decorate(main: Callable[[Sequence[str]], None]) -> Main:
        @functools.wraps(main)
        def run(arguments: Sequence[str]) -> int:
            print_anywhere()
            try:
                main(arguments)
                sys.stdout.flush()
            except BrokenPipeError:  # `| head` has read enough; Python would flush once more at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            except (UserError, RunStopped) as reason:
                print(f"{name}: {in_one_line(reason)}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(f"{name}: {interrupted}", file=sys.stderr)
                return 130
            return 0

        return run

    return decorate


Main = Callable[[Sequence[str]], int]


def path_of(text: str) -> Path:
    """An argument that names a file or folder, with ~ written out."""
    return Path(os.path.expanduser(text))  # noqa: PTH111, as Path raises where there is no such user


def at_least_1(text: str) -> int:
    """An argument that counts something."""
    try:
        if (count := int(text)) >= 1:
            return count
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r:.100} is no whole number of at least 1")
