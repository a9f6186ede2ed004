"""`recommend` and what it measures with; that numbers are there and belong together, never how large a time is."""

import re
import subprocess
import sys
import time

import pytest
import torch

from vision_attn import create_block, describe, list_blocks, recommend
from vision_attn.blocks import dense, linear
from vision_attn.cost import clock, flops, forward_backward, measure, parameters, peak_memory, times

MIXERS = {name for name in list_blocks() if describe(name).kind == "mixer"}


def test_every_mixer_stands_beside_dense():
    found = recommend(5, 7, 32, seconds=0)
    assert {one.name for one in found} == MIXERS and len(found) == len(MIXERS)
    assert [one.ms for one in found] == sorted(one.ms for one in found)
    (dense,) = [one for one in found if one.name == "dense"]
    assert dense.times_dense == dense.memory_times_dense == 1
    for one in found:
        assert one.ms > 0 and one.times_dense == one.ms / dense.ms
        assert one.mebibytes > 0 and one.memory_times_dense == one.mebibytes / dense.mebibytes


def test_nothing_is_printed_beside():
    """In a process of its own: torch's profiler tells of memory that whatever ran before it gives back."""
    program = "from vision_attn import recommend; recommend(5, 7, 32, seconds=0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_cannot_be_causal_or_has_too_few_channels_is_left_out():
    causal = {one.name for one in recommend(5, 7, 32, causal=True, seconds=0)}
    assert causal == {name for name in MIXERS if describe(name).causal}
    few = {one.name for one in recommend(5, 7, 2, seconds=0, blocks="[cp]*")}
    assert {"dense", "criss_cross"} <= few and "per_head" not in few


def test_a_wildcard_chooses_and_dense_stays():
    assert {one.name for one in recommend(5, 7, 32, blocks="criss*", seconds=0)} == {"criss_cross", "dense"}
    assert [one.name for one in recommend(5, 7, 32, blocks="dense", seconds=0)] == ["dense"]


@pytest.mark.parametrize(
    "blocks, causal, why",
    [
        ("cbam", False, "cbam: is a gate"),
        ("zz*", False, "no block matches"),
        ("criss*", True, "criss_cross: causal=True: criss_cross can't be causal"),
        ("per_head", False, "per_head: num_heads=2: must be ≥ 3"),
    ],
)
def test_nothing_to_compare_is_an_error_that_says_why(blocks, causal, why):
    with pytest.raises(ValueError, match=re.escape(f"blocks={blocks!r}: nothing to compare: {why}")):
        recommend(5, 7, 32, causal=causal, num_heads=2, blocks=blocks, seconds=0)


def test_heads_batch_and_type_are_as_asked():
    small, large = (recommend(5, 7, 32, blocks="linear", seconds=0, batch=n) for n in (1, 11))
    assert max(one.mebibytes for one in small) < min(one.mebibytes for one in large)
    half = recommend(5, 7, 32, num_heads=2, dtype=torch.bfloat16, blocks="per*", seconds=0)
    assert {one.name for one in half} == {"dense", "performer", "permutohedral"}  # per_head needs three


@pytest.mark.parametrize(
    "wrong",
    [dict(height=0), dict(width=-3), dict(dim=2.5), dict(batch=0), dict(causal="yes"), dict(num_heads=5)],
)
def test_bad_arguments_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        recommend(**(dict(height=5, width=7, dim=32) | wrong))


def test_what_there_is_no_memory_for_is_left_out_and_said(monkeypatch):
    def full(self, x, grid):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1099511627776 bytes")

    monkeypatch.setattr(linear.Block, "forward", full)
    with pytest.warns(UserWarning, match="linear is left out: not enough memory"):
        assert {one.name for one in recommend(5, 7, 32, blocks="l[io]n*", seconds=0)} == MIXERS & {
            *("dense", "linformer", "longformer")
        }
    monkeypatch.setattr(dense.Block, "forward", full)
    with pytest.raises(RuntimeError, match="can't allocate"):
        recommend(5, 7, 32, blocks="linformer", seconds=0)


def test_what_is_slow_is_called_but_twice(monkeypatch):
    calls = {"linear": 0, "dense": 0}

    def counting(block, seconds):
        def forward(self, x, grid, real=block.forward):
            calls[type(self).__module__.rpartition(".")[2]] += 1
            time.sleep(seconds)
            return real(self, x, grid)

        monkeypatch.setattr(block, "forward", forward)

    counting(dense.Block, 0.0)
    counting(linear.Block, 1.0)
    recommend(5, 7, 32, blocks="linear", seconds=0)
    assert calls == {"linear": 2, "dense": 4}


def test_an_unknown_block_gets_the_nearest():
    with pytest.raises(ValueError, match="nearest: criss_cross"):
        recommend(5, 7, 32, blocks="cris_cross")


# What it measures with


def test_calls_take_turns():
    order = []
    taken = times({name: lambda name=name: order.append(name) for name in "abc"}, "cpu", least=3)
    assert "".join(order) == "abcabcabc"
    assert list(taken) == ["a", "b", "c"] and all(len(each) == 3 for each in taken.values())


def test_turns_go_on_while_there_is_time(monkeypatch):
    moments = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    assert [len(each) for each in times({"a": list, "b": list}, "cpu", seconds=31).values()] == [7, 7]
    assert clock(list, "cpu") == 1e3  # one tick later


def test_forward_and_backward_leave_nothing_behind():
    block, x = create_block("linear", 37), torch.randn(3, 35, 37)
    seen = []
    block.qkv.weight.register_hook(seen.append)
    forward_backward(block, x, (5, 7))()
    assert len(seen) == 1 and seen[0].abs().sum() > 0
    assert not x.requires_grad and all(p.grad is None for p in block.parameters())


def test_a_cost_is_of_the_module():
    blocks = {name: create_block(name, 32) for name in ("linear", "dense")}
    x = torch.randn(1, 35, 32)
    costs = measure(blocks, x, (5, 7))
    for name, block in blocks.items():
        assert costs[name].flops == flops(block, x, (5, 7)) and costs[name].parameters == parameters(block)
        least = (x.nbytes + sum(p.nbytes for p in block.parameters())) / 2**20  # their gradients
        assert costs[name].mebibytes > least and costs[name].ms > 0


def test_memory_is_what_is_held_at_once():
    """Two tensors of 1 MiB at a time, three in all."""

    def call():
        one = torch.ones(2**18)
        two = one + 1
        del one
        return two + 1

    assert peak_memory(call, "cpu") == pytest.approx(2, rel=0.01)
