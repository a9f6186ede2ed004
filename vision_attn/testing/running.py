"""The ways in which torch may run a block: compiled, traced, checkpointed, transformed, repeated."""

import copy

import torch
from torch.utils.checkpoint import checkpoint

from ..grid import Grid
from .case import GRID, holds_for
from .oracle import assert_equal, assert_same_bits


@holds_for("any", slow=True)
def compiles_to_one_graph_for_any_size(case):
    """torch.compile makes one graph without breaks, which gives the same numbers and gradients at other sizes."""
    layer = case.layer(**case.wide_keys)
    torch._dynamo.reset()
    compiled = torch.compile(copied := copy.deepcopy(layer), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for grid in (Grid(29, 31), Grid(37, 29), Grid(31, 41)):  # above one tile each way: one is a case of its own
            with case.trying(grid=grid):
                x = case.map(grid)
                out, expected = compiled(x), layer(x)
                assert_equal(out, expected)
                direction = torch.randn_like(out)
                out.backward(direction), expected.backward(direction)
    for p, other in zip(copied.parameters(), layer.parameters()):
        assert_equal(p.grad, other.grad)


@holds_for("any", slow=True)
def is_traced_for_any_size(case):
    """torch.export makes a graph with free batch, height and width, which gives the same numbers at other sizes."""
    layer, free = case.layer(**case.wide_keys), torch.export.Dim.DYNAMIC
    x = torch.randn(3, layer.block.dim, 29, 31, dtype=torch.float64)
    traced = torch.export.export(layer, (x,), dynamic_shapes=({0: free, 2: free, 3: free},))
    graph = traced.module(check_guards=False)
    for shape in ((2, 13, 17), (5, 7, 11), (4, 37, 29)):
        with case.trying(shape=shape):
            x = torch.randn(shape[0], layer.block.dim, *shape[1:], dtype=torch.float64)
            assert_equal(graph(x), layer(x))


@holds_for("any")
def activations_may_be_computed_twice(case):
    """Under gradient checkpointing the gradients are the same bits."""
    layer, x = case.layer(**case.wide_keys).train(), case.map(GRID)
    with case.trying(grid=GRID):
        direct = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), list(layer.parameters()))
        assert_same_bits(again, direct)


@holds_for("any")
def is_a_function_of_its_parameters(case):
    """torch.func takes it: functional_call, vmap over images and over stacked weights, gradients image by image."""
    layer, x = case.layer(**case.wide_keys), case.map(GRID)
    state = {name: t.detach() for name, t in layer.state_dict().items()}
    with case.trying(transform="functional_call"):
        assert_equal(torch.func.functional_call(layer, state, (x,)), layer(x))
    with case.trying(transform="vmap over images"), torch.no_grad():  # with a gradient torch refuses a learned bias
        assert_equal(torch.func.vmap(lambda image: layer(image[None])[0])(x), layer(x))
    with case.trying(transform="vmap over weights"):
        stacked = {name: torch.stack([t, t]) for name, t in state.items()}
        outs = torch.func.vmap(lambda state: torch.func.functional_call(layer, state, (x,)))(stacked)
        assert_equal(outs, torch.stack([layer(x)] * 2))
    with case.trying(transform="vmap of grad"):
        weights = {name: state[name] for name, p in layer.named_parameters() if p.requires_grad}

        def loss(weights, image):
            return torch.func.functional_call(layer, {**state, **weights}, (image[None],)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        layer(x).square().sum().backward()
        assert_equal(
            {name: t.sum(dim=0) for name, t in each.items()}, {n: layer.get_parameter(n).grad for n in weights}
        )


@holds_for("any")
def the_same_seed_gives_the_same_bits(case):
    """With torch's deterministic algorithms, which none of its operations lacks, a step of training can be repeated."""
    given = {"attn_drop": 0.2, "proj_drop": 0.3} if case.is_mixer else {}
    try:
        layer = case.layer(**case.wide_keys, **given).train()
    except ValueError:  # attn_drop is refused
        layer = case.layer(**case.wide_keys).train()
    x, was = case.map(GRID), torch.are_deterministic_algorithms_enabled()

    def step(seed):
        torch.manual_seed(seed)
        one = copy.deepcopy(layer)
        out = one(x)
        return out, *torch.autograd.grad(out.square().sum(), list(one.parameters()))

    try:
        torch.use_deterministic_algorithms(True)
        with case.trying(grid=GRID):
            assert_same_bits(step(1), step(1))
    finally:
        torch.use_deterministic_algorithms(was)
