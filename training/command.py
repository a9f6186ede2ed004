"""A function as a command: its arguments are options, its docstring is their help, bad input ends in one line."""

import sys
from collections.abc import Callable

from jsonargparse import ArgumentParser


def run(
    function: Callable[..., None],
    description: str,
    argv: list[str] | None,
    refused: tuple[type[Exception], ...] = (ValueError, OSError),
    failed: tuple[type[Exception], ...] = (),
) -> int:
    """Calls ``function`` with what ``argv`` (None: the command line) says; the exit code.

    0: done; 1: it raised one of ``failed``; 2: it raised one of ``refused``. What it raised is said in one line.
    """
    parser = ArgumentParser(description=description, allow_abbrev=False)
    parser.add_function_arguments(function)
    arguments = vars(parser.parse_args(argv))
    try:
        function(**arguments)
    except failed as error:
        return said(error, 1)
    except refused as error:
        return said(error, 2)
    return 0


def said(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code
