"""What attention is: weights, what they depend on, and order."""

import itertools

import torch
from torch import nn

from ..engines.route import route
from .case import BATCH, GRID, GRIDS, HEADS, KEY, PREFIXES, SMALL, holds_for
from .oracle import assert_equal, assert_same_bits, assert_same_function, sides, step_sides


@holds_for("average")
def rows_of_weights_sum_to_one(case):
    """Weights are not negative, and each token's sum to 1."""
    for grid, prefix in itertools.product(GRIDS, PREFIXES):
        with case.trying(grid=grid, prefix=prefix):
            for step in case.block().steps:
                q, k = torch.randn(2, BATCH, HEADS, prefix + grid.size, KEY, dtype=torch.float64)
                weights = step.weights(q, k, grid)
                assert weights.min() >= 0
                assert_equal(weights.sum(-1), torch.ones_like(weights[..., 0]))


@holds_for("average")
def what_all_tokens_agree_on_is_kept(case):
    """Where all values are 1, so is what every token gets: nothing from outside, such as padding, comes in.

    Also where large scores are all the same, whose logarithm of a sum rounds to any one of them.
    """
    for grid, prefix in itertools.product(GRIDS, PREFIXES):
        with case.trying(grid=grid, prefix=prefix):
            for fast, _, (q, k, v) in step_sides(case.block(), grid, prefix):
                alike = [1e9 * t[:, :, :1].expand_as(t) for t in (q, k)]
                for queries, keys in ((q, k), alike):
                    assert_equal(fast(queries, keys, torch.ones_like(v)), torch.ones_like(v))


@holds_for("softmax")
def a_shift_of_all_scores_of_a_query_changes_nothing(case):
    """A vector added to all keys shifts all scores of a query alike, which a softmax does not see."""
    with case.trying(grid=GRID):
        for fast, _, (q, k, v) in step_sides(case.block(), GRID, 5):
            assert_equal(fast(q, k + 3 * torch.randn(KEY, dtype=torch.float64), v), fast(q, k, v))


@holds_for("softmax")
def order_matters_where_the_pattern_says_so(case):
    """With rows, columns or positions permuted, outputs are those permuted exactly where the mask stays the same."""
    for grid, prefix in itertools.product(GRIDS[1:], PREFIXES):
        places = torch.arange(grid.size).view(grid)
        rows, columns = torch.randperm(grid.height), torch.randperm(grid.width)
        orders = {"rows": places[rows], "columns": places[:, columns], "positions": torch.randperm(grid.size)}
        for name, order in orders.items():
            order = torch.cat([torch.arange(prefix), prefix + order.flatten()])
            with case.trying(grid=grid, prefix=prefix, permuted=name):
                for step in case.block().steps:
                    q, k, v = torch.randn(3, BATCH, HEADS, prefix + grid.size, KEY, dtype=torch.float64)
                    mask = step.pattern.head_masks(HEADS, grid, prefix)
                    out = step.mix(q, k, v, grid)[:, :, order]
                    other = step.mix(*(t[:, :, order] for t in (q, k, v)), grid)
                    stays = torch.equal(mask[:, order][..., order], mask)
                    assert torch.allclose(other, out, rtol=1e-9, atol=1e-10) == stays


@holds_for("mixer")
def attention_shows_what_moves_to_where(case):
    """`attention` gives a weight for each pair of tokens, of each head where there is one step."""
    block, x = case.block(), case.input(GRID)
    with case.trying(grid=GRID):
        seen = block.attention(x, GRID)
        assert seen.shape == (BATCH, HEADS if len(block.steps) == 1 else 1, 5 + GRID.size, 5 + GRID.size)
        if all(step.averages for step in block.steps):
            assert_equal(seen.sum(-1), torch.ones_like(seen[..., 0]))


@holds_for("gate")
def attention_map_is_a_weight_for_every_position(case):
    """`attention_map` gives every position a number from 0 to 1."""
    block = case.block()
    for grid in GRIDS:
        with case.trying(grid=grid):
            seen = block.attention_map(case.input(grid))
            assert seen.shape == (BATCH, *grid)
            assert (0 <= seen).all() and (seen <= 1).all()


@holds_for("mixer")
def attention_dropout_drops_weights_or_is_refused(case):
    """``attn_drop`` drops that share of the weights and scales the rest, in training; or it is refused by name."""
    try:
        block = case.block(attn_drop=0.4)
    except ValueError as refusal:
        assert "attn_drop=0.4" in str(refusal)
        return
    tokens = 5 + GRID.size
    q, k = torch.randn(2, BATCH, HEADS, tokens, KEY, dtype=torch.float64)
    values = torch.eye(tokens, dtype=torch.float64).expand(BATCH, HEADS, -1, -1)  # so that the output is the weights
    with case.trying(grid=GRID):
        for step in block.train().steps:
            weights = step.weights(q, k, GRID)
            out = step.mix(q, k, values, GRID)
            kept = out != 0
            assert_equal(out[kept], weights[kept] / 0.6)
            assert 0.58 < kept[weights != 0].double().mean() < 0.62
            assert_equal(step.eval().mix(q, k, values, GRID), weights)


@holds_for("mixer")
def output_dropout_drops_outputs(case):
    """``proj_drop`` drops that share of the outputs and scales the rest, in training."""
    block, x = case.block(proj_drop=0.4), case.input(GRID)
    with case.trying(grid=GRID):
        last = block.steps[-1] if block.steps else block
        exact, out = last(x, GRID), last.train()(x, GRID)
        kept = out != 0
        assert 0.58 < kept.double().mean() < 0.62
        assert_equal(out[kept], exact[kept] / 0.6)


@holds_for("mixer")
def scale_is_one_over_the_root_of_the_key_channels_or_refused(case):
    """``scale`` is (channels of a key)^-½ unless given, and matters; or it is refused by name."""
    try:
        given = case.block(scale=KEY**-0.5)
    except ValueError as refusal:
        assert f"scale={KEY**-0.5}" in str(refusal)
        return
    (same, other), x = (case.block(), case.block(scale=1.3)), case.input(GRID)
    same.load_state_dict(given.state_dict())
    other.load_state_dict(given.state_dict())
    with case.trying(grid=GRID):
        assert_same_bits(same(x, GRID), given(x, GRID))
        assert not torch.allclose(other(x, GRID), given(x, GRID))
        for fast, plain, inputs in sides(other, GRID, 5):
            assert_same_function(fast, plain, inputs, [])


@holds_for("mixer")
def queries_and_keys_are_normalised_on_request(case):
    """``qk_norm`` gives each head's queries mean 0 and variance 1, or is refused by name; biases can be left out."""
    plain, x = case.block(qkv_bias=False, proj_bias=False), case.input(GRID)
    assert not {name for name, _ in plain.named_parameters() if name.endswith(("qkv.bias", "proj.bias"))}
    try:
        block = case.block(qk_norm=True)
    except ValueError as refusal:
        assert "qk_norm=True" in str(refusal)
        return
    with case.trying(grid=GRID):
        for step in block.steps:
            nn.init.ones_(step.q_norm.weight), nn.init.zeros_(step.q_norm.bias)
            step.q_norm.eps, step.rotary = 0, None  # a turn comes after the norms
            q, _, _ = step.heads(x, GRID)
            assert_equal(q.mean(-1), torch.zeros_like(q[..., 0]))
            assert_equal(q.var(-1, unbiased=False), torch.ones_like(q[..., 0]))


@holds_for("causal")
def the_future_has_no_effect(case):
    """Whatever comes later in raster order, outputs are the same bits, also at scores beyond float16's range.

    What is allowed to reach some of what has changed does so; without a pattern, everything later.
    """
    trials = itertools.product(("union", "auto"), ((torch.float64, 1), (torch.float16, 1000)))
    for name, (dtype, size) in trials:
        block, x = case.block(**case.wide_keys).to(dtype), (size * case.input(GRID)).to(dtype)
        with route(name):
            out = block(x, GRID)
        seen = block.pattern.mask(GRID) if hasattr(block, "pattern") else torch.ones(GRID.size, GRID.size)
        for place in (0, GRID.width - 1, GRID.width, GRID.size // 2):
            with case.trying(grid=GRID, place=place, dtype=dtype, route=name), route(name):
                changed = x.clone()
                changed[:, 5 + place + 1 :] = 10 * size * torch.randn_like(changed[:, 5 + place + 1 :])
                other = block(changed, GRID)
                assert torch.equal(other[:, : 5 + place + 1], out[:, : 5 + place + 1])
                if dtype == torch.float64:  # large scores may reach but one, which is not changed
                    reaches = seen[place + 1 :, place + 1 :].any(-1)
                    assert (other[:, 5 + place + 1 :] != out[:, 5 + place + 1 :]).any(-1)[:, reaches].all()


@holds_for("causal")
def step_by_step_it_gives_the_same(case):
    """Made pixel by pixel, outputs are those of the whole, also under autocast, where no sum of the past overflows."""
    block, x = case.block(**case.wide_keys), case.input(SMALL, prefix=0)

    def stepped(block, x):
        cache = block.new_cache(len(x), SMALL)
        return torch.stack([block.step(x[:, i], i, cache) for i in range(SMALL.size)], dim=1)

    with case.trying(grid=SMALL), torch.no_grad():
        assert_equal(stepped(block, x), block(x, SMALL))
    block = block.float()
    for dtype in (torch.bfloat16, torch.float16):
        with case.trying(grid=SMALL, autocast=dtype), torch.autocast("cpu", dtype), torch.no_grad():
            for size in (1, 1000):
                out, exact = stepped(block, size * x.float()).float(), block(size * x.float(), SMALL).float()
                assert out.isfinite().all() == exact.isfinite().all()
                if size == 1:
                    assert (out - exact).norm() < 0.05 * exact.norm()


@holds_for("causal")
def what_is_allowed_of_the_past_is_reached(case):
    """The last position reaches what its pattern allows; what chooses by content, what has a weight; others everything.

    Exactly that, and itself as the one that asks.
    """
    block = case.block()
    with case.trying(grid=GRID):
        x = case.input(GRID, prefix=0).requires_grad_()
        (slope,) = torch.autograd.grad(block(x, GRID)[:, -1].sum(), x)
        if hasattr(block, "pattern"):
            allowed = block.pattern.mask(GRID)[-1].repeat(BATCH, 1)
        elif hasattr(block, "choose"):
            allowed = (block.attention(x, GRID)[:, :, -1] != 0).any(1)
        else:
            allowed = torch.ones(BATCH, GRID.size, dtype=torch.bool)
        allowed[:, -1] = True
        assert torch.equal((slope != 0).any(-1), allowed)
