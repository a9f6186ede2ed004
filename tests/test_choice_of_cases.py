"""What `make test` leaves to `make test-all` is a choice of combinations: nothing is left out of both."""

from itertools import product

import pytest
from conftest import OFTEN, block_of, chosen, first_options, in_turn, is_slow, often

from vision_attn import list_blocks


def parametrized(choices):
    """All parameters of a test that meets the choices in turn, and those that are quick."""

    @in_turn(choices)
    def test():
        pass

    ((_, params),) = [mark.args for mark in test.pytestmark]
    return [param.values for param in params], [param.values for param in params if not is_slow(param)]


@pytest.mark.parametrize("first", ["ab", "abcd", "abcdefghi"])
def test_in_turn_everything_is_met_by_something(first):
    every, quick = parametrized({"one": first, "two, three": [(2, 3), (5, 7)], "four": [True, False]})
    combined = [(*some, last) for some in ((2, 3), (5, 7)) for last in (True, False)]
    assert every == [(one, *rest) for one, rest in product(first, combined)]
    assert len(quick) == max(len(first), 4)
    assert {values[0] for values in quick} == set(first) and {values[1:] for values in quick} == set(combined)


def test_what_is_slow_already_takes_no_turn():
    slow = pytest.param("b", marks=pytest.mark.slow)
    every, quick = parametrized({"one": ["a", slow, "c"], "two": [2, pytest.param(5, marks=pytest.mark.slow), 3]})
    assert len(every) == 9 and quick in ([("a", 2), ("c", 3)], [("a", 3), ("c", 2)])


def test_every_block_has_its_first_options_and_a_few_blocks_are_tried_more():
    quick = [block_of(param.values[0]) for param in first_options(chosen("any_case")) if not is_slow(param)]
    assert quick == list_blocks()
    assert {param.values[0] for param in often(list_blocks()) if not is_slow(param)} == set(OFTEN) & set(list_blocks())
