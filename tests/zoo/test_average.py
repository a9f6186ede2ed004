"""The bases of EM attention follow the images by a moving average: exactly once per optimizer step, whatever ran."""

import copy
import gc
import io
import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vision_attn import average, create_block, list_blocks

if "expectation_maximization" not in list_blocks():
    pytest.skip("no block keeps an average", allow_module_level=True)

DIM, BASES = 7, 5


def new_block(**options):
    torch.manual_seed(0)
    return create_block("expectation_maximization", DIM, bases=BASES, **options).double()


def images(count, seed=1):
    return torch.randn(count, DIM, 3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def found(block, x):
    """The bases that EM finds in each image, from the stored ones, (B, C, K)."""
    with torch.no_grad():
        return block.fit(block.before(x).flatten(2))[1]


def moved(block, found):
    """The paper's moving average, one step, on the unit sphere."""
    mean = 0.9 * block.bases.value + 0.1 * found.mean(dim=0)
    return (mean / mean.norm(dim=0)).clone()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6)  # the authors add 1e-6 to norms


def loss(out):
    return out.square().mean()


def test_an_optimizer_step_moves_them_once():
    block, x = new_block(), images(2)
    optimizer = sgd(block)
    for _ in range(3):
        before, expected = block.bases.value.clone(), moved(block, found(block, x))
        loss(block(x)).backward()
        assert torch.equal(block.bases.value, before), "not in forward or backward"
        optimizer.step()
        optimizer.zero_grad()
        assert_close(block.bases.value, expected)
        before = block.bases.value.clone()
        optimizer.step()
        assert torch.equal(block.bases.value, before), "nothing new was seen"


def test_accumulated_batches_count_as_one():
    block, x = new_block(), images(6)
    optimizer = sgd(block)
    expected = moved(block, found(block, x))
    for part in x.chunk(3):
        loss(block(part)).backward()
    optimizer.step()
    assert_close(block.bases.value, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(use_reentrant):
    block, x = new_block(), images(6)
    optimizer = sgd(block)
    expected = moved(block, found(block, x))
    for part in x.chunk(3):
        loss(checkpoint(block, part.requires_grad_(), use_reentrant=use_reentrant)).backward()
    optimizer.step()
    assert_close(block.bases.value, expected)


def test_compiling_changes_nothing():
    torch._dynamo.reset()
    block, x = new_block(), images(24)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    optimizer = sgd(block)
    for _ in range(2):
        expected = moved(block, found(block, x))
        for part in x.chunk(12):  # more batches than torch.compile makes graphs
            loss(compiled(part)).backward()
        optimizer.step()
        assert_close(block.bases.value, expected)


def test_autocast_changes_little():
    block, x = new_block().float(), images(2).float()
    optimizer, expected = sgd(block), moved(block, found(block, x))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(block(x))
    value.backward()
    optimizer.step()
    torch.testing.assert_close(block.bases.value, expected, rtol=0, atol=0.01)
    assert block.bases.value.dtype == torch.float32


@pytest.mark.parametrize("freeze", ["eval", "no_grad", "inference_mode"])
def test_looking_without_training_is_not_counted(freeze):
    block, x = new_block(), images(2)
    optimizer = sgd(block)
    before = block.bases.value.clone()
    if freeze == "eval":
        loss(block.eval()(x)).backward()
    else:
        with getattr(torch, freeze)():
            block(x)
    optimizer.step()
    assert torch.equal(block.bases.value, before)


def test_the_step_of_another_optimizer_is_not_theirs():
    block, other, x = new_block(), nn.Linear(3, 5), images(2)
    before = block.bases.value.clone()
    loss(block(x)).backward()
    sgd(other).step()
    assert torch.equal(block.bases.value, before)
    sgd(block).step()
    assert not torch.equal(block.bases.value, before)


def test_a_frozen_block_stays():
    """Fine-tuning a head: the block runs in training mode, but no optimizer holds it."""
    block, head = new_block(), nn.Conv2d(DIM, 3, 1).double()
    before = block.bases.value.clone()
    loss(head(block.requires_grad_(False)(images(2)))).backward()
    sgd(head).step()
    assert torch.equal(block.bases.value, before)


def test_each_of_two_blocks_moves_with_its_own_optimizer():
    one, two, x = new_block(), new_block(), images(2)
    before = one.bases.value.clone()
    loss(two(one(x))).backward()
    sgd(two).step()
    assert torch.equal(one.bases.value, before) and not torch.equal(two.bases.value, before)


def test_the_average_of_weights_is_not_moved_by_training():
    block, x = new_block(), images(2)
    ema, optimizer = copy.deepcopy(block), sgd(block)
    start = block.bases.value.clone()
    loss(block(x)).backward()
    later = copy.deepcopy(block)  # in the middle of a step
    loss(ema(x)).backward()
    optimizer.step()
    assert not torch.equal(block.bases.value, start)
    assert torch.equal(ema.bases.value, start) and torch.equal(later.bases.value, start)
    assert ema.bases.value.data_ptr() != block.bases.value.data_ptr()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_trains_on_its_own(copied):
    block, x = new_block(), images(2)
    loss(block(images(2, seed=3))).backward()  # what it has seen before is not the copy's
    copy_, start = copied(block), block.bases.value.clone()
    expected = moved(copy_, found(copy_, x))
    loss(copy_(x)).backward()
    sgd(copy_).step()
    assert_close(copy_.bases.value, expected)
    assert torch.equal(block.bases.value, start)


def test_the_state_holds_them_and_nothing_in_passing():
    block = new_block()
    loss(block(images(2))).backward()
    sgd(block).step()
    loss(block(images(2, seed=3))).backward()  # seen, but no step yet
    state = block.state_dict()
    assert [key for key in state if key.startswith("bases")] == ["bases.value"]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = new_block()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.bases.value, block.bases.value)


def test_a_block_that_is_gone_is_forgotten():
    gc.collect()
    before = len(average._live)
    block = new_block()
    assert len(average._live) == before + 1
    del block
    gc.collect()
    assert len(average._live) == before


def train(block, module, x):
    """Two steps; BatchNorm with its stored statistics, which do not depend on how a batch is divided."""
    block.norm.eval()
    optimizer = sgd(module)
    for _ in range(2):
        optimizer.zero_grad()
        loss(module(x)).backward()
        optimizer.step()
    return block.state_dict()


def one_process(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    block = new_block()
    state = train(block, DistributedDataParallel(block), images(6).chunk(2)[rank])
    torch.save(state, f"{results}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # taking gloo down in an orderly way aborts now and then


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    mp.spawn(one_process, args=(tmp_path / "rendezvous", tmp_path), nprocs=2)
    block = new_block()
    whole = train(block, block, images(6))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), dict(whole), rtol=1e-9, atol=1e-10)


def test_an_overflow_leaves_no_trace():
    block = new_block()
    optimizer, before = sgd(block), block.bases.value.clone()
    block.bases.note(torch.full_like(before, torch.inf))
    optimizer.step()
    assert torch.equal(block.bases.value, before) and block.bases._notes is None


def test_paper_gradients_leave_nothing_that_never_learns():
    block = new_block(grad="paper")
    loss(block(images(2))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in block.parameters())
