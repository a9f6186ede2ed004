"""Arguments, right and wrong, made from a block's signature."""

import math
import types
import typing

from hypothesis import strategies as st

from ..check import Count
from ..zoo import parameters
from .case import holds_for


def arguments(block_class: type) -> dict[str, object]:
    """Types of the keyword arguments of a block, those that it hands on to its base included."""
    found = parameters(block_class)
    return {name: found[name].annotation for name in found if name not in ("device", "dtype")}


def values_of(annotation) -> st.SearchStrategy | None:
    """Values that an argument of this type might take, some of which its class may refuse."""
    size, rate = st.integers(1, 9), st.floats(0.05, 0.95)
    if typing.get_origin(annotation) is typing.Literal:
        return st.sampled_from(typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = [values_of(part) for part in typing.get_args(annotation)]
        return st.one_of([part for part in parts if part is not None])
    if typing.get_origin(annotation) is tuple:
        inner = [part for part in typing.get_args(annotation) if part is not Ellipsis]
        if len(inner) == 2:
            return st.tuples(*map(values_of, inner))
        return st.lists(values_of(inner[0]), min_size=1, max_size=4).map(tuple)
    known = {bool: st.booleans(), int: size, Count: st.integers(0, 9), float: rate, type(None): st.none()}
    return known.get(annotation)


@holds_for("any")
def wrong_arguments_are_refused_by_name(case):
    """Every argument refuses values of the wrong type or size when the block is made, with its name and the value."""
    for name, annotation in {"dim": int, **arguments(case.block_class)}.items():
        for wrong in wrong_values(annotation):
            with case.trying(argument=f"{name}={wrong!r}"):
                try:
                    case.new(**{name: wrong})
                except (ValueError, TypeError) as refusal:
                    assert f"{name}={wrong!r}" in str(refusal), f"says only: {refusal}"
                else:
                    raise AssertionError(f"{name}={wrong!r} is accepted")
    with case.trying(argument="num_haeds=1"):
        try:
            case.new(num_haeds=1)
        except TypeError as refusal:
            assert "num_haeds" in str(refusal)
        else:
            raise AssertionError("num_haeds=1 is accepted")


def wrong_values(annotation) -> list:
    """Values that no argument of this type may take; none for types that only a class can judge."""
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    if type(None) in parts:
        given = [part for part in parts if part is not type(None)]
        return [wrong for wrong in wrong_values(given[0] if len(given) == 1 else int | tuple) if wrong is not None]
    if typing.get_origin(annotation) is type:
        return ["LayerNorm", 3, ()]
    if parts:  # an integer or a pair of them
        return [0, -1, 2.5, "3", None, (3,), (3, 0), (2, 3, 5)]
    if typing.get_origin(annotation) is typing.Literal:
        return ["no such", "", 7, ("no such",)]
    if typing.get_origin(annotation) is tuple:
        return ["no such", ("no such",), (), None, 3]
    return {
        int: [0, -1, 1.5, "3", None, True, (3, 5)],
        Count: [-1, 1.5, "3", None, True, (3, 5)],
        float: [math.nan, math.inf, -0.5, "0.5", None, True],
        bool: ["no", 1, None],
    }.get(annotation, [])
