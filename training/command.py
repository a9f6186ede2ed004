"""Command lines: what they may be spelled like, and errors in one line that name the nearest option.

A function is a command: its arguments are options, its docstring is their help.
"""

import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable
from typing import NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser


class Parser(ArgumentParser):
    """A parser that says in one line what is wrong, and which option is nearest to an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        options = [word[2:] for action in self._actions for word in action.option_strings if word.startswith("--")]
        print(f"error: {told(message, options)}", file=sys.stderr)
        sys.exit(2)


def told(message: str, options: list[str]) -> str:
    """What the parser says, in one line for people."""
    line = " ".join(message.split())
    if found := re.fullmatch(r"unrecognized arguments: (\S+).*", line):
        if not found[1].startswith("--"):
            return f"{found[1]!r} follows no option: options begin with --"
        name = found[1][2:].partition("=")[0]
        return f"unknown option --{name}{_hint(name, options, '--')}"
    if found := re.fullmatch(r"Group '(.+)' does not accept option '(.+)'", line):
        name = f"{found[1]}.{found[2]}"
        return f"unknown option {name}{_hint(name, options)}"
    if found := re.fullmatch(r"Option '(.+)' is not accepted.*", line):
        return f"unknown option {found[1]}{_hint(found[1], options)}"
    if found := re.fullmatch(
        r'Parser key "(.+?)": Does not validate .* Subtypes: \[(.+)\] Errors: .* value: (.*)', line
    ):
        kinds = " or ".join(_readable(kind) for kind in re.split(r", (?![^\[]*\])", found[2]))
        return f"{found[1]} must be {kinds}, got {found[3]}"
    if found := re.fullmatch(r'Parser key "(.+?)": Expected a (.+)\. Got value: (.*)', line):
        return f"{found[1]} must be {_readable(found[2])}, got {found[3]}"
    return re.sub(r'^Parser key "(.+?)": ', r"\1: ", line)


def nearest(name: str, options: list[str]) -> list[str]:
    """The options most like `name`: those that end as it does (lr: optim.lr), else the most similar one."""
    last = name.rpartition(".")[2]
    alike = [option for option in options if option.rpartition(".")[2] == last]
    if alike:
        return alike

    def likeness(option: str) -> float:
        pairs = (name, option), (last, option.rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(options, key=likeness, default="")
    return [best] if best and likeness(best) >= 0.7 else []


def _hint(name: str, options: list[str], prefix: str = "") -> str:
    found = nearest(name.replace("-", "_"), options)
    return f"; nearest: {', '.join(prefix + option for option in found)}" if found else "; --help lists all"


def _readable(kind: str) -> str:
    """A type as people call it: <class 'int'> is int, typing.Literal['a', 'b'] is a or b."""
    if literal := re.fullmatch(r"(?:typing\.)?Literal\[(.+)\]", kind):
        return literal[1].replace("'", "").replace(", ", " or ")
    return re.sub(r"<class '(.+?)'>", r"\1", kind).replace("NoneType", "null")


def spelled_out(argv: list[str], types: dict[str, type]) -> list[str]:
    """`argv` with _ for - in the names of options, `true` after a switch without a value, and several words after an
    option that takes a list as one: `--data.img_size 192 256` as `--data.img_size '[192, 256]'`.

    Args:
        types: of the options, by name.
    """
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        words.append(f"--{name}{equals}{value}")
        kind = types.get(name)
        if equals or kind is None:
            continue
        given = []
        while rest and not rest[0].startswith("--"):
            given.append(rest.pop(0))
        if kind is bool and not given:
            words.append("true")
        elif _takes_lists(kind) and (len(given) > 1 or (given and not _takes_one(kind) and not _whole(given[0]))):
            words.append(f"[{', '.join(given)}]" if all(map(_is_number, given)) else json.dumps(given))
        else:
            words += given
    return words


def _takes_lists(kind) -> bool:
    return any(get_origin(each) in (list, tuple) for each in (kind, *get_args(kind)))


def _takes_one(kind) -> bool:
    """Whether a single value does as well as a list."""
    return any(each in (int, float, str) for each in (get_args(kind) if get_origin(kind) not in (list, tuple) else ()))


def _whole(word: str) -> bool:
    return word == "null" or word.startswith("[")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


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
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_function_arguments(function)
    types = {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}
    arguments = vars(parser.parse_args(spelled_out(sys.argv[1:] if argv is None else argv, types)))
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
