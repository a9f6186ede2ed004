"""By which route a pattern is computed: which is taken, that it may be asked for, and that masks are made once."""

import copy
import pickle
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vision_attn import Grid, create_block, kept, recommend, route
from vision_attn.engines.route import dense_is_faster
from vision_attn.pattern import Column, Pattern, PerHead, Row, Window

DIM = 66  # of 6 heads


@pytest.fixture(autouse=True)
def whichever_is_fastest():
    with route("auto"):
        kept._tensors.clear()
        yield


def taken(name, grid, **options):
    block = create_block(name, DIM, num_heads=6, **options)
    with route() as names:
        block(torch.randn(2, 3 + grid.size, DIM), grid)
    return names


@pytest.mark.parametrize("name", ["window", "global_tokens", "fixed", "multiscale", "binary_partition"])
def test_small_grids_take_the_whole_mask_and_large_ones_key_sets(name):
    assert taken(name, Grid(11, 13)) == {"dense"}
    assert taken(name, Grid(41, 43)) == {"union"}


def test_short_rows_are_concatenated():
    assert taken("criss_cross", Grid(23, 19)) == {"flat"}
    assert taken("axial", Grid(17, 13)) == {"union"}  # of one set each, which needs no merge


def test_one_route_is_asked_for_in_this_thread_alone():
    block, grid = create_block("criss_cross", DIM), Grid(5, 7)
    x, seen = torch.randn(2, grid.size, DIM), {}

    def elsewhere():
        with route() as names:
            block(x, grid)
        seen["elsewhere"] = names

    for name in ("dense", "flat", "union"):
        with route(name) as seen[name]:
            block(x, grid)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        with route() as seen["after"]:
            block(x, grid)
        assert seen == {**seen, name: {name}, "elsewhere": {"dense"}, "after": {"dense"}}


def test_what_is_no_route_is_refused():
    with pytest.raises(ValueError, match="route='fast': must be one of auto, dense, flat, union, flex"):
        with route("fast"):
            pass


@pytest.mark.parametrize("name", ["dense", "flat"])
def test_graphs_hold_the_route_that_is_asked_for(name):
    """At other sizes, too; and what is compiled anew is another graph."""
    block, compiled = create_block("criss_cross", DIM).eval(), None
    with torch.no_grad(), route(name):
        compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
        for grid in (Grid(5, 7), Grid(11, 3), Grid(13, 17)):
            x = torch.randn(2, 3 + grid.size, DIM)
            torch.testing.assert_close(compiled(x, grid), block(x, grid), rtol=1e-5, atol=1e-6)


def test_masks_are_made_once(monkeypatch):
    made = []

    class Counted(Window):
        def allowed(self, *args):
            made.append(1)
            return super().allowed(*args)

    block, grid = create_block("window", DIM).double(), Grid(7, 11)
    block.pattern = Counted((2, 1))
    x = torch.randn(2, grid.size, DIM, dtype=torch.float64)
    block(x, grid)
    count = len(made)
    again = copy.deepcopy(block)
    with torch.inference_mode():
        wanted = again(x, grid).clone()
    assert torch.equal(block(x, grid), wanted) and len(made) == count > 0
    block(torch.randn(2, 35, DIM, dtype=torch.float64), Grid(5, 7))
    assert len(made) > count


def test_nothing_kept_goes_with_a_block():
    block, grid = create_block("window", DIM), Grid(7, 11)
    before = len(pickle.dumps(block))
    block(torch.randn(2, grid.size, DIM), grid)
    assert kept._tensors and len(pickle.dumps(block)) == before


def test_what_is_kept_is_bounded(monkeypatch):
    """The oldest goes first; what is too large is not kept at all."""
    monkeypatch.setattr(kept, "MOST", 4 * 1000)
    for size in (300, 400, 500, 1001):
        kept.kept(lambda size, device: (torch.zeros(size, dtype=torch.uint8), None), size, device=torch.device("cpu"))
    assert [key[1] for key in kept._tensors] == [300, 400, 500]
    for size in range(991, 1000):
        kept.kept(lambda size, device: (torch.zeros(size, dtype=torch.uint8),), size, device=torch.device("cpu"))
    assert [key[1] for key in kept._tensors] == [996, 997, 998, 999]


def test_a_pattern_without_a_hash_works_as_well():
    class Listed(Pattern):
        __hash__ = None

        def allowed(self, qy, qx, ky, kx, grid):
            return qy == ky

        def key_sets(self):
            return Row().key_sets()

    block, grid = create_block("axial", DIM).double().chain[0], Grid(7, 11)
    x = torch.randn(2, grid.size, DIM, dtype=torch.float64)
    block.pattern = Row()
    wanted = block(x, grid)
    block.pattern = Listed()
    with route("dense"):
        torch.testing.assert_close(block(x, grid), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(block(x, grid), wanted, rtol=1e-10, atol=1e-12)
    assert not any(isinstance(part, Listed) for key in kept._tensors for part in key)


def test_recommend_says_by_which_route():
    routes = {one.name: one.route for one in recommend(5, 7, 32, blocks="[cdlsw]*", seconds=0)}
    assert routes == {**routes, "window": "dense", "dense": "dense", "linear": "", "criss_cross": "dense"}
    with route("union"):
        assert {one.name: one.route for one in recommend(5, 7, 32, blocks="window", seconds=0)}["window"] == "union"


def test_on_cuda_the_whole_mask_is_taken_while_launches_take_longer():
    with FakeTensorMode():

        def dense(pattern, side, images, dtype=torch.bfloat16):
            q = torch.empty(images, 4, side * side, 8, device="cuda", dtype=dtype)
            return dense_is_faster(pattern, q, Grid(side, side))

        window, fold = Window((3, 3)), Row()
        assert all(dense(pattern, 17, 61) for pattern in (window, fold, window | Column()))
        assert not any(dense(pattern, 67, 1) for pattern in (window, window | Column()))
        assert dense(window | Column(), 61, 5) and not dense(window, 61, 5) and not dense(window | Column(), 61, 11)
        assert not dense(fold, 61, 3)
        by_head = PerHead((window, fold))  # a mask for each head, too many numbers to keep
        assert dense(by_head, 47, 1) and not dense(by_head, 47, 1, torch.float64)
