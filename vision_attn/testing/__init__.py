"""What every block must hold to, for anyone's block: `check_block` tries it and shows what fails, on a small example.

    from vision_attn.testing import check_block
    check_block(MyBlock)                            # a subclass of Mixer or Gate, with its defaults
    check_block(MyBlock, bases=5, causal=True)      # with options

Each function under `holds_for` in the files beside is one property; its docstring says it in a sentence. The zoo's own
tests run the same functions over the registry. Needs hypothesis.
"""

from fnmatch import fnmatch

import torch

from ..gate import Gate
from ..mixer import Mixer
from . import arguments, attention, exact, hard_input, inputs, running, state  # noqa: F401  enter their properties
from .case import PROPERTIES, Case

__all__ = ["PROPERTIES", "Case", "check_block"]


def check_block(block_class: type, *, only: str = "*", unfelt: tuple[str, ...] = (), **options) -> int:
    """Tries every property on a block and prints what holds; returns the number of trials.

    Args:
        block_class: a subclass of `Mixer` or `Gate` that takes the arguments of its base.
        only: wildcard of the names of properties to try.
        unfelt: parameters that may have no gradient, because the output does not depend on them.
        options: further keyword arguments of the block.

    Raises:
        AssertionError: a property fails; all of those are named, each with its smallest example.
        TypeError: the class is no block.
        ValueError: no property has such a name, or none that has applies to the block.
    """
    if not isinstance(block_class, type) or not issubclass(block_class, (Mixer, Gate)):
        raise TypeError(f"block_class={block_class!r}: must be a subclass of Mixer or Gate")
    chosen = [each for each in PROPERTIES if fnmatch(each.name, only)]
    if not chosen:
        raise ValueError(
            f"only={only!r}: no property has such a name; there are {', '.join(p.name for p in PROPERTIES)}"
        )
    case, failed = Case(block_class, options, frozenset(unfelt)), []
    applicable = [each for each in chosen if each.applies(case)]
    if not applicable:
        raise ValueError(f"only={only!r}: no such property applies to {case}")
    for each in applicable:
        torch.manual_seed(0)
        before = case.trials
        try:
            each.check(case)
        except Exception as error:
            said = [f"{type(error).__name__}: {error}".strip(), *getattr(error, "__notes__", ())]
            lines = [line for note in said for line in note.split("\n") if line.strip()]
            failed.append("\n    ".join([f"{each.name}: {each.sentence}", *lines]))
            print(f"FAILS  {each.name}: {each.sentence}")
        else:
            print(f"holds  {each.name}: {each.sentence} ({case.trials - before})")
    if failed:
        raise AssertionError("\n".join([f"{case}: {len(failed)} properties fail", *failed]))
    print(f"{case}: everything holds, {case.trials} trials")
    return case.trials
