"""The grid of a ViT's tokens reaches every layer, in any thread and order of passes, or is refused; it is not guessed.

A 3×5 grid and a 5×3 grid have as many tokens: what takes one for the other fails here.
"""

import copy
import gc
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from conftest import GATES, MIXERS, alive, every_block, in_turn, often
from timm.models._manipulate import checkpoint_seq
from torch import nn
from torch.utils.checkpoint import checkpoint

import backbones
from vision_attn import Grid, list_blocks

WIDE, TALL, LARGE = (12, 20), (20, 12), (28, 44)  # grids 3×5, 5×3 and 7×11
if "criss_cross" in MIXERS:  # rows are not columns to it
    MIXERS = ["criss_cross", *(name for name in MIXERS if name != "criss_cross")]


def vit(block, **args):
    args = {"depth": 3, "embed_dim": 48, "img_size": WIDE, "num_classes": 7, "dynamic_img_size": True, **args}
    return alive(timm.create_model(f"vit_tiny_patch4_32_{block}", **args)).eval()


def with_gates(block=GATES[0]):
    return alive(backbones.insert(vit(MIXERS[0]), block, init_gain=0.5)).eval()


HOW = {
    "mixer": lambda: vit(MIXERS[0]),
    "gate": lambda: vit(GATES[0]),
    "both": with_gates,
    "mixer behind attention": lambda: alive(
        backbones.insert(timm.create_model("vit_tiny_patch4_32", depth=3, num_classes=7, dynamic_img_size=True),
                         MIXERS[0], "blocks.*.attn", init_gain=0.5)
    ),
    "last block only": lambda: alive(
        backbones.insert(timm.create_model("vit_tiny_patch4_32", depth=3, num_classes=7, dynamic_img_size=True),
                         MIXERS[0], "blocks.2", init_gain=0.5)
    ),
}  # fmt: skip
every_way = pytest.mark.parametrize("how", HOW)


def images(*sizes):
    return [torch.randn(2, 3, *size) for size in sizes]


def slopes(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def assert_same(got, wanted):
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True) if a is not None or b is not None)


def without_grad(function):
    """Whether gradients are on is a matter of each thread."""
    return torch.no_grad()(function)


# Threads


@every_block
def test_threads_do_not_mix_up_their_grids(block):
    model, many = vit(block, depth=2), images(*(WIDE, TALL, LARGE) * 4)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with torch.no_grad(), ThreadPoolExecutor(4) as pool:
            wanted = [model(x) for x in many]
            assert_same(pool.map(without_grad(model), many), wanted)
    finally:
        sys.setswitchinterval(interval)


@every_way
def test_threads_train_as_one_does(how):
    model, many = HOW[how]().train(), images(*(WIDE, TALL) * 3)
    model.set_grad_checkpointing()
    wanted = [slopes(model, model(x).square().sum()) for x in many]
    with ThreadPoolExecutor(3) as pool:
        losses = list(pool.map(lambda x: model(x).square().sum(), many))
        for got, one in zip(pool.map(lambda loss: slopes(model, loss), losses), wanted):
            assert_same(got, one)


def test_tokens_may_go_on_in_another_thread():
    """Blocks spread over threads, as in a pipeline: tokens that passed a block carry their grid."""
    model, (x, other) = vit(MIXERS[0]), images(WIDE, TALL)
    with torch.no_grad():
        wanted = model(x)
        tokens = model.blocks[0](model._pos_embed(model.patch_embed(x)))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(without_grad(model), other).result()
            after = pool.submit(without_grad(model.blocks[1:]), tokens).result()
    assert torch.equal(model.forward_head(model.norm(after)), wanted)


def test_another_threads_grid_is_not_taken():
    model, (x,) = vit(MIXERS[0]), images(WIDE)
    model(x)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="grid: the patch embedding has not run"):
        pool.submit(model.blocks, torch.randn(2, 16, 48)).result()


# Gradient checkpointing


@in_turn({"how": HOW, "reentrant": [False, True], "every": [1, 2]})
def test_several_sizes_before_one_backward(how, every, reentrant, monkeypatch):
    """As in training on several crops, with an evaluation in between."""

    def in_parts(functions, x):
        return checkpoint_seq(functions, x, every=every, use_reentrant=reentrant)

    monkeypatch.setattr("timm.models.vision_transformer.checkpoint_seq", in_parts)
    model, many = HOW[how]().double().train(), [x.double() for x in images(WIDE, TALL, LARGE, WIDE)]
    wanted = slopes(model, sum(model(x).square().sum() for x in many))
    model.set_grad_checkpointing()
    losses = [model(x).square().sum() for x in many]
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, *TALL, dtype=torch.float64))
    model.train()
    sum(losses).backward()
    for parameter, slope in zip(model.parameters(), wanted):  # reentrant ones add up in another order
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", often(list_blocks()))
def test_a_late_backward_of_the_transposed_size(block):
    model, (x, other) = vit(block, depth=2), images(WIDE, TALL)
    wanted = [slopes(model, model(x).square().sum()), slopes(model, model(other).square().sum())]
    model.set_grad_checkpointing()
    late, last = model(x).square().sum(), model(other).square().sum()
    assert_same(slopes(model, last), wanted[1])
    assert_same(slopes(model, late), wanted[0])


def test_backward_in_another_thread():
    """As on an accelerator, where autograd has a thread of its own."""
    model, (x, other) = with_gates(), images(WIDE, TALL)
    wanted = slopes(model, model(x).square().sum() + model(other).square().sum())
    model.set_grad_checkpointing()
    loss = model(x).square().sum() + model(other).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_same([p.grad for p in model.parameters()], wanted)


class Parts(nn.Module):
    """Runs a ViT with ``run`` around each of its blocks, or around all of it."""

    def __init__(self, vit, run, whole=False):
        super().__init__()
        self.vit, self.run, self.whole = vit, run, whole

    def forward(self, x):
        if self.whole:
            return self.run(self.vit, x)
        x = self.vit._pos_embed(self.vit.patch_embed(x))
        for block in self.vit.blocks:
            x = self.run(block, x)
        return self.vit.forward_head(self.vit.norm(x))


def plainly(function, x):
    return checkpoint(function, x, use_reentrant=False)


def moved(function, x):
    """As where what is kept is moved to the CPU: it comes back in other memory."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        return plainly(function, x)


def copied(function, x):
    return plainly(lambda x: function(x.clone()), x)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("run", [plainly, moved, copied])
def test_checkpoints_of_ones_own(run, whole):
    model, many = with_gates(), images(WIDE, LARGE, WIDE)
    wanted = slopes(model, sum(model(x).square().sum() for x in many))
    parts = Parts(model, run, whole)
    assert_same(slopes(model, sum(parts(x).square().sum() for x in many)), wanted)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("run", [plainly, moved, copied])
def test_checkpoints_of_ones_own_are_right_or_refused_where_grids_have_as_many_tokens(run, whole):
    model, many = with_gates(), images(WIDE, TALL)
    wanted = slopes(model, sum(model(x).square().sum() for x in many))
    parts = Parts(model, run, whole)
    loss = sum(parts(x).square().sum() for x in many)
    if run is plainly or whole:
        assert_same(slopes(model, loss), wanted)
    else:
        with pytest.raises(ValueError, match=r"grid: .* before these 16 tokens .*, or several grids may be theirs"):
            slopes(model, loss)


class Inside(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x, attn_mask=None, is_causal=False):
        return plainly(self.attn, x)


@pytest.mark.parametrize("how", ["mixer", "mixer behind attention"])
def test_checkpoints_inside_a_block(how):
    model, many = HOW[how](), images(WIDE, TALL)
    wanted = slopes(model, sum(model(x).square().sum() for x in many))
    for block in model.blocks:
        block.attn = Inside(block.attn)
    assert_same(slopes(model, sum(model(x).square().sum() for x in many)), wanted)


# Blocks run by hand


def embedded(model, x):
    return model._pos_embed(model.patch_embed(x))


@torch.no_grad()
def test_images_embedded_first_and_run_later():
    model, many = vit(MIXERS[0]), images(WIDE, LARGE)
    wanted = [model.norm(model.blocks(embedded(model, x))) for x in many]
    tokens = [embedded(model, x) for x in many]
    assert_same([model.norm(model.blocks(x)) for x in tokens], wanted)


@torch.no_grad()
def test_which_of_two_grids_is_not_guessed():
    model, (x, other) = vit(MIXERS[0]), images(WIDE, TALL)
    wanted, tokens = model(x), [embedded(model, image) for image in (x, other)]
    with pytest.raises(ValueError, match="grid: .*several grids may be theirs"):
        model.blocks(tokens[0])
    assert torch.equal(model(x), wanted)


class Interrupted(Exception):
    pass


def embed_alone(model, x):
    model.patch_embed(x)


def interrupt(model, x):
    """After the patches are made, before a block has begun."""

    def stop(*_):
        raise Interrupted

    hook = model.norm_pre.register_forward_pre_hook(stop)
    with pytest.raises(Interrupted):
        model(x)
    hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("left", [embed_alone, interrupt])
@every_way
def test_a_forward_does_not_mind_what_was_embedded_and_never_run(how, left):
    model, (x, other, large) = HOW[how]().eval(), images(WIDE, TALL, LARGE)
    wanted = [model(image) for image in (other, large, other)]
    left(model, x)
    assert_same([model(image) for image in (other, large, other)], wanted)


@torch.no_grad()
def test_tokens_embedded_before_a_forward_are_right_or_refused_after_it():
    model, (x, other, large) = vit(MIXERS[0]), images(WIDE, TALL, LARGE)
    wanted = model.blocks(embedded(model, x))
    tokens = embedded(model, x)
    model(large)
    assert torch.equal(model.blocks(tokens), wanted)
    tokens = embedded(model, x)
    model(other)
    with pytest.raises(ValueError, match="grid: .*several grids may be theirs"):
        model.blocks(tokens)


@torch.no_grad()
def test_two_images_in_one_forward_are_not_guessed():
    class Pair(nn.Module):
        """Embeds both images before it runs one."""

        def __init__(self, vit):
            super().__init__()
            self.vit = vit

        def forward(self, x, other):
            tokens = [embedded(self.vit, image) for image in (x, other)]
            return self.vit.blocks(tokens[0])

    with pytest.raises(ValueError, match="grid: .*several grids may be theirs"):
        Pair(vit(MIXERS[0]))(*images(WIDE, TALL))


@torch.no_grad()
def test_images_that_take_turns_block_by_block():
    model, many = vit(MIXERS[0]), images(WIDE, TALL, LARGE)
    wanted, tokens = [model(x) for x in many], []
    for x in many:
        tokens.append(model.blocks[0](embedded(model, x)))
    for block in model.blocks[1:]:
        tokens = [block(x) for x in tokens]
    assert_same([model.forward_head(model.norm(x)) for x in tokens], wanted)


@torch.no_grad()
def test_memory_that_is_written_to_forgets_its_grid():
    """As a buffer that tokens of one image after another are copied to."""
    model, (x, other) = vit(MIXERS[0]), images(WIDE, TALL)
    wanted = model.blocks(embedded(model, other))
    buffer = embedded(model, x)
    model.blocks(buffer)
    buffer.copy_(embedded(model, other))
    assert torch.equal(model.blocks(buffer), wanted)


@torch.inference_mode()
def test_where_writing_can_not_be_seen_it_is_not_overlooked():
    """Tensors of inference mode have no version."""
    model, (x, other) = vit(MIXERS[0]), images(WIDE, TALL)
    wanted = [model(image) for image in (x, other)]
    tokens, buffer = model.blocks[0](embedded(model, other)), embedded(model, x)
    model.blocks(buffer)
    for write in (lambda: buffer.copy_(embedded(model, other)), lambda: buffer.copy_(model.blocks[0](tokens))):
        write()
        with pytest.raises(ValueError, match="grid: .*inference_mode.*torch.no_grad"):
            model.blocks(buffer)
    assert_same([model(image) for image in (x, other)], wanted)


@torch.inference_mode()
def test_turns_and_threads_in_inference_mode():
    """Right as elsewhere where grids have numbers of positions of their own."""
    model, many = vit(MIXERS[0]), images(WIDE, LARGE)
    wanted, tokens = [model(x) for x in many], []
    for x in many:
        tokens.append(model.blocks[0](embedded(model, x)))
    for block in model.blocks[1:]:
        with ThreadPoolExecutor(1) as pool:
            tokens = list(pool.map(torch.inference_mode()(block), tokens))
    assert_same([model.forward_head(model.norm(x)) for x in tokens], wanted)


# Copies, graphs, transforms


def test_copies_know_no_grid_and_find_their_own():
    model, (x, other) = with_gates(), images(WIDE, TALL)
    wanted = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="grid: the patch embedding has not run"):
            twin.blocks(torch.randn(2, 16, 48))
        model(other)
        assert torch.equal(twin(x), wanted)
        assert backbones.grids.source_at(twin.patch_embed) is not backbones.grids.source_at(model.patch_embed)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_and_blocks_take_any_grid(whole):
    torch.compiler.reset()
    model, many = vit(MIXERS[0], depth=1), images(WIDE, TALL, LARGE)
    wanted = [model(x) for x in many]
    for part in [model] if whole else model.blocks:
        part.compile(fullgraph=True, dynamic=True, backend="eager")
    for x, answer in zip(many, wanted):
        torch.testing.assert_close(model(x), answer)


@pytest.mark.slow
def test_compiled_blocks_in_threads_and_checkpoints():
    torch.compiler.reset()
    model, many = vit(MIXERS[0], depth=1), images(*(WIDE, LARGE) * 3)
    wanted = [slopes(model, model(x).square().sum()) for x in many]
    model.blocks[0].compile(fullgraph=True, dynamic=True, backend="eager")
    model.set_grad_checkpointing()
    with ThreadPoolExecutor(1) as forward, ThreadPoolExecutor(1) as backward:
        for x, one in zip(many, wanted):
            loss = forward.submit(lambda: model(x).square().sum()).result()  # noqa: B023
            torch.testing.assert_close(backward.submit(slopes, model, loss).result(), one)
    more = images(*(WIDE, TALL) * 6)
    answers = [model(x) for x in more]
    with ThreadPoolExecutor(2) as pool:
        assert_same(pool.map(model, more), answers)


@torch.no_grad()
def test_vmap_over_images():
    model, (x,) = with_gates(), images(WIDE)
    torch.testing.assert_close(torch.func.vmap(lambda image: model(image[None])[0])(x), model(x))


@in_turn({"block": often(list_blocks()), "grad": [False, True]})
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_a_trace_holds_for_its_size_and_refuses_others(block, grad):
    model, (x, other, large, again) = vit(block, depth=1), images(WIDE, TALL, LARGE, WIDE)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x)
    for one in (x, again):
        torch.testing.assert_close(traced(one), model(one))
    for one in (other, large):
        with pytest.raises(RuntimeError, match="expanded size"):
            traced(one)
    model(other)  # and the model goes on with any


# Memory


def test_nothing_is_kept_of_past_calls():
    model = with_gates().train()
    model.set_grad_checkpointing()
    source, tokens = backbones.grids.source_at(model.patch_embed), []
    model.blocks[1].attn.register_forward_pre_hook(lambda attn, args: tokens.append(weakref.ref(args[0])))
    for x in images(*(WIDE, TALL, LARGE) * 5):
        model(x).sum().backward()
    gc.collect()
    assert len(tokens) == 30 and not any(ref() for ref in tokens)
    assert source.thread.grid == Grid(7, 11) and source.thread.waiting == ()
    assert source.only == {15: None, 77: Grid(7, 11)}
    for x in images(*(WIDE, TALL, LARGE) * 5):
        model.patch_embed(x)
    assert len(source.thread.waiting) == 3
