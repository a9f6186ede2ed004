"""What every block of the registry must hold to: above all, the fast path is the definition."""

import copy
import io
import pickle

import pytest
import torch
from conftest import BATCH, GRIDS, HEADS, KEY, PREFIXES, UNFELT, VALUE, lived_in
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vision_attn import Grid, create_block, create_layer, describe
from vision_attn.zoo import block_class

GRID = Grid(*GRIDS[0])
SMALL = Grid(2, 3)


def sides(block, grid, prefix):
    """For each step of a block: its fast path, its definition, and inputs for both.

    Of a mixer with values as wide as keys, which takes torch's flash attention, and of another width, which does not.
    """
    if describe(block.__module__.split(".")[-1]).kind == "gate":
        return [(block.gate, block.reference, [torch.randn(BATCH, block.dim, *grid, dtype=torch.float64)])]
    tokens = prefix + grid.size
    return [
        (
            lambda q, k, v, step=step: step.mix(q, k, v, grid),
            lambda q, k, v, step=step: step.weights(q, k, grid) @ v,
            [torch.randn(BATCH, HEADS, tokens, d, dtype=torch.float64) for d in (KEY, KEY, value)],
        )
        for step in block.steps
        for value in (VALUE, KEY)
    ]


def definition(block):
    """A copy of a block that computes by its definition."""
    block = copy.deepcopy(block)
    if hasattr(block, "reference"):
        block.gate = block.reference
    else:
        for step in block.steps:
            step.mix = lambda q, k, v, grid, step=step: step.weights(q, k, grid) @ v
    return block


def gradients(function, inputs, parameters):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return out, torch.autograd.grad(out, [*inputs, *parameters], direction, allow_unused=True, materialize_grads=True)


def assert_same_function(fast, plain, inputs, parameters):
    out, slopes = gradients(fast, inputs, parameters)
    expected, expected_slopes = gradients(plain, inputs, parameters)
    assert_equal(out, expected)
    assert_equal(slopes, expected_slopes)


def assert_equal(actual, expected):
    """Up to the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def error(actual, exact):
    return (actual.double() - exact).abs().max().item()


# The fast path is the definition


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("grid", GRIDS)
def test_mix_is_weights_times_values(mixer_case, grid, prefix):
    block = mixer_case.block()
    for fast, plain, inputs in sides(block, Grid(*grid), prefix):
        assert_same_function(fast, plain, inputs, list(block.parameters()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_gate_is_reference(gate_case, grid, training):
    block = gate_case.block().train(training)
    for fast, plain, inputs in sides(block, Grid(*grid), 0):
        assert_same_function(fast, plain, inputs, list(block.parameters()))


def test_float32_is_close_to_the_definition(any_case):
    block = any_case.block()
    x = any_case.input(GRID)
    exact = any_case.run(definition(block), x, GRID)
    assert error(any_case.run(block.float(), x.float(), GRID), exact) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_definition_in_it(any_case, dtype):
    block = any_case.block().to(dtype)
    exact_block = copy.deepcopy(block).double()
    for (fast, plain, inputs), (_, exact, _) in zip(sides(block, GRID, 5), sides(exact_block, GRID, 5)):
        inputs = [x.to(dtype) for x in inputs]
        out, expected = fast(*inputs), exact(*(x.double() for x in inputs))
        assert out.dtype == dtype
        assert error(out, expected) <= 2 * error(plain(*inputs), expected)


def test_autocast_is_as_good_as_the_definition_in_bfloat16(any_case):
    block, x = any_case.block(), any_case.input(GRID)
    exact = any_case.run(definition(block), x, GRID)
    plain = any_case.run(definition(block).bfloat16(), x.bfloat16(), GRID)
    with torch.autocast("cpu", torch.bfloat16):
        out = any_case.run(block.float(), x.float(), GRID)
    assert error(out, exact) <= 2 * error(plain, exact)


def test_gradient_is_that_of_finite_differences(any_case):
    block = any_case.block()
    x = any_case.input(SMALL, prefix=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: any_case.run(block, x, SMALL), x, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_scores_stay_finite(any_case, dtype):
    block = any_case.block().to(dtype)
    for fast, _, inputs in sides(block, GRID, 5):
        inputs = [(30 * x).to(dtype).requires_grad_() for x in inputs]
        out = fast(*inputs)
        out.float().mean().backward()
        assert out.isfinite().all() and all(x.grad.isfinite().all() for x in inputs)


class Largest(TorchDispatchMode):
    """Notes the largest number of elements that any operation gave memory to."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_no_matrix_of_all_pairs_is_made_forward_or_backward(mixer_case):
    grid = Grid(41, 43)
    options = {**mixer_case.options, "num_heads": HEADS}
    block = create_block(mixer_case.name, HEADS * VALUE, **options)  # with keys as wide as values, as it is used
    x = torch.randn(1, 5 + grid.size, block.dim, requires_grad=True)
    with Largest() as largest:
        block(x, grid).sum().backward()
    assert largest.size < HEADS * grid.size**2 / 2


# What a mixer's weights are


@pytest.mark.parametrize("prefix", PREFIXES)
def test_rows_of_weights_sum_to_one(mixer_case, prefix):
    for step in mixer_case.block().steps:
        q, k = torch.randn(2, BATCH, HEADS, prefix + GRID.size, KEY, dtype=torch.float64)
        weights = step.weights(q, k, GRID)
        assert weights.min() >= 0
        assert_equal(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_attention_shows_what_moves_to_where(mixer_case):
    block, x = mixer_case.block(), mixer_case.input(GRID)
    seen = block.attention(x, GRID)
    assert seen.shape == (BATCH, HEADS if len(block.steps) == 1 else 1, 5 + GRID.size, 5 + GRID.size)
    assert_equal(seen.sum(-1), torch.ones_like(seen[..., 0]))


def test_attention_map_is_a_weight_for_every_position(gate_case):
    block, x = gate_case.block(), gate_case.input(GRID)
    seen = block.attention_map(x)
    assert seen.shape == (BATCH, *GRID)
    assert (0 <= seen).all() and (seen <= 1).all()


def test_attention_dropout_drops_weights_or_is_refused(mixer_case):
    try:
        block = mixer_case.block(attn_drop=0.4)
    except ValueError as refusal:
        assert "attn_drop=0.4" in str(refusal)
        return
    tokens = 5 + GRID.size
    q, k = torch.randn(2, BATCH, HEADS, tokens, KEY, dtype=torch.float64)
    values = torch.eye(tokens, dtype=torch.float64).expand(BATCH, HEADS, -1, -1)  # so that the output is the weights
    for step in block.train().steps:
        weights = step.weights(q, k, GRID)
        out = step.mix(q, k, values, GRID)
        kept = out != 0
        assert_equal(out[kept], weights[kept] / 0.6)
        assert 0.58 < kept[weights != 0].double().mean() < 0.62
        assert_equal(step.eval().mix(q, k, values, GRID), weights)


def test_output_dropout_drops_outputs(mixer_case):
    block, x = mixer_case.block(proj_drop=0.4), mixer_case.input(GRID)
    last, exact = block.steps[-1], block.steps[-1](x, GRID)
    out = last.train()(x, GRID)
    kept = out != 0
    assert 0.58 < kept.double().mean() < 0.62
    assert_equal(out[kept], exact[kept] / 0.6)


def test_scale_is_one_over_the_root_of_the_key_channels_or_refused(mixer_case):
    try:
        given = mixer_case.block(scale=KEY**-0.5)
    except ValueError as refusal:
        assert f"scale={KEY**-0.5}" in str(refusal)
        return
    (same, other), x = (mixer_case.block(), mixer_case.block(scale=1.3)), mixer_case.input(GRID)
    same.load_state_dict(given.state_dict())
    other.load_state_dict(given.state_dict())
    assert torch.equal(same(x, GRID), given(x, GRID))
    assert not torch.allclose(other(x, GRID), given(x, GRID))
    for fast, plain, inputs in sides(other, GRID, 5):
        assert_same_function(fast, plain, inputs, [])


def test_queries_and_keys_are_normalised_on_request(mixer_case):
    block, x = mixer_case.block(qk_norm=True), mixer_case.input(GRID)
    plain = lived_in(mixer_case.block(qkv_bias=False, proj_bias=False))
    assert not {name for name, _ in plain.named_parameters() if name.endswith(("qkv.bias", "proj.bias"))}
    for step in block.steps:
        nn.init.ones_(step.q_norm.weight), nn.init.zeros_(step.q_norm.bias)
        q, _, _ = step.heads(x, GRID)
        assert_equal(q.mean(-1), torch.zeros_like(q[..., 0]))
        torch.testing.assert_close(q.var(-1, unbiased=False), torch.ones_like(q[..., 0]), rtol=1e-3, atol=0)


# How inputs may come


def test_maps_may_be_channels_last_or_strided(gate_case):
    block, x = gate_case.block(), gate_case.input(GRID)
    strided = torch.randn(x.shape[0], x.shape[1] * 2, x.shape[2], x.shape[3] * 3, dtype=x.dtype)[:, ::2, :, ::3]
    strided.copy_(x)
    for other in (x.to(memory_format=torch.channels_last), strided, x.mT.contiguous().mT):
        assert not other.is_contiguous()
        assert_equal(block(other), block(x))


def test_tokens_may_be_strided(mixer_case):
    block, x = mixer_case.block(), mixer_case.input(GRID)
    assert_equal(block(x.mT.contiguous().mT, GRID), block(x, GRID))
    for fast, _, inputs in sides(block, GRID, 5):
        transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]  # as a fused qkv gives them
        one_for_all = [t[:, :1].expand(-1, HEADS, -1, -1) for t in inputs]
        assert_equal(fast(*transposed), fast(*inputs))
        assert_equal(fast(*one_for_all), fast(*(t.contiguous() for t in one_for_all)))


def test_an_input_is_never_modified(any_case):
    x = any_case.input(GRID)
    before = x.clone()
    any_case.run(any_case.block().train(), x, GRID)
    assert torch.equal(x, before) and x._version == 0


def test_images_of_a_batch_never_mix(any_case):
    block, x = any_case.block(), any_case.input(GRID)
    out = any_case.run(block, x, GRID)
    assert_equal(any_case.run(block, x[:1], GRID), out[:1])
    x[1] = torch.randn_like(x[1])
    assert torch.equal(any_case.run(block, x, GRID)[0], out[0])


def test_a_size_leaves_nothing_behind(any_case):
    block, x = any_case.block(), any_case.input(GRID)
    before = any_case.run(block, x, GRID)
    for grid in (SMALL, Grid(GRID.width, GRID.height)):
        any_case.run(block, any_case.input(grid, prefix=1), grid)
    assert torch.equal(any_case.run(block, x, GRID), before)


@pytest.mark.parametrize("dim", [1, 31, 37, 67])
def test_any_width_has_defaults(block_name, dim):
    if dim == 1 and block_name in ("factored", "per_head"):  # three patterns can't share one channel
        with pytest.raises(ValueError, match="num_heads=1: must be ≥ 3"):
            create_layer(block_name, dim)
        return
    layer = create_layer(block_name, dim)
    assert layer(torch.randn(2, dim, 5, 3)).shape == (2, dim, 5, 3)


# What a block keeps


def test_every_parameter_learns(any_case):
    layer = any_case.layer().train()
    x = torch.randn(BATCH, layer.block.dim, *GRID, dtype=torch.float64)
    out = layer(x)
    out.backward(torch.randn_like(out))
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        felt = name.removeprefix("block.") not in UNFELT.get(any_case.name, ())
        assert (p.grad.abs().max() > 1e-9) == felt, name


def test_gradients_are_finite_where_the_map_is_zero(any_case):
    """As in a new ResNet, whose last norm in a block starts with weight 0, and with the zero biases of a ViT."""
    layer = any_case.layer().train()
    with torch.no_grad():
        for name, p in layer.block.named_parameters():
            p.mul_(not name.endswith("bias"))
    x = torch.zeros(BATCH, layer.block.dim, *GRID, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    for slope in [x.grad, *(p.grad for p in layer.parameters())]:
        assert slope.isfinite().all()


def test_state_goes_round(any_case):
    block, x = any_case.block(), any_case.input(GRID)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = any_case.block()
    assert not torch.equal(any_case.run(other, x, GRID), any_case.run(block, x, GRID))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(any_case.run(other, x, GRID), any_case.run(block, x, GRID))


def test_copies_and_pickles(any_case):
    layer = any_case.layer()
    x = torch.randn(BATCH, layer.block.dim, *GRID, dtype=torch.float64)
    layer(x).sum().backward()  # a copy is taken in the middle of training
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert not {id(p) for p in other.parameters()} & {id(p) for p in layer.parameters()}


def test_device_and_dtype_reach_every_tensor(any_case):
    block = create_block(any_case.name, **{**any_case.sizes, **any_case.options}, device="meta", dtype=torch.bfloat16)
    tensors = list(block.parameters()) + [b for b in block.buffers() if b.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.bfloat16)}


def test_a_block_made_without_memory_can_be_reset(any_case):
    """As sharded training builds a model: on the meta device; each module with tensors of its own resets itself."""
    layer = create_layer(any_case.name, **{**any_case.sizes, **any_case.options}, device="meta").to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(77)
    for module in layer.modules():
        if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
            module.reset_parameters()
    assert not any((t == 77).any() for t in layer.state_dict().values())
    x = torch.randn(BATCH, layer.block.dim, *GRID)
    assert torch.equal(layer(x), x)


# Order


def test_the_future_has_no_effect(causal_case):
    block, x = causal_case.block(), causal_case.input(GRID)
    out = block(x, GRID)
    for place in (0, GRID.width - 1, GRID.width, GRID.size // 2):
        changed = x.clone()
        changed[:, 5 + place + 1 :] = 10 * torch.randn_like(changed[:, 5 + place + 1 :])
        other = block(changed, GRID)
        assert torch.equal(other[:, : 5 + place + 1], out[:, : 5 + place + 1])
        assert (other[:, 5 + place + 1 :] != out[:, 5 + place + 1 :]).any(-1).all()


def test_what_is_allowed_of_the_past_is_heard(causal_case):
    block = causal_case.block()
    x = causal_case.input(GRID, prefix=0).requires_grad_()
    (slope,) = torch.autograd.grad(block(x, GRID)[:, -1].sum(), x)
    allowed = block.pattern.mask(GRID)[-1] if hasattr(block, "pattern") else torch.ones(GRID.size, dtype=torch.bool)
    assert torch.equal((slope != 0).any(-1), allowed.expand(BATCH, -1))


def test_what_cannot_be_causal_says_why(block_name):
    if describe(block_name).causal:
        return
    reason = block_class(block_name).not_causal
    for make in (create_block, create_layer):
        with pytest.raises(ValueError) as refusal:
            make(block_name, 37, causal=True)
        assert f"causal=True: {block_name}" in str(refusal.value) and reason in str(refusal.value)
        make(block_name, 37, causal=False)
