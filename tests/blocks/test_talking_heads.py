import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block, describe
from vision_attn.cost import flops
from vision_attn.engines import by_rows

GRID = Grid(13, 17)  # more rows than a chunk has
DIM, HEADS = 39, 3


def talkative(**options):
    """A block whose heads mix at random."""
    block = create_block("talking_heads", DIM, num_heads=HEADS, **options).double()
    torch.nn.init.normal_(block.p_l), torch.nn.init.normal_(block.p_w)
    return block


@pytest.mark.parametrize("causal", [False, True])
def test_it_starts_as_dense_attention(causal):
    ours, dense = (create_block(name, DIM, num_heads=HEADS, causal=causal).double() for name in BLOCKS)
    missing, unexpected = ours.load_state_dict(dense.state_dict(), strict=False)
    assert (missing, unexpected) == (["p_l", "p_w"], [])
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(x, GRID), dense(x, GRID), rtol=1e-10, atol=1e-12)


BLOCKS = ("talking_heads", "dense")


def test_each_pair_of_tokens_is_mixed_as_the_paper_says():
    """Σ_l P_w[l, h] softmax over j of Σ_g P_l[g, l] q_g · k_g, one query at a time; from heads to heads, not back."""
    block = talkative()
    q, k, v = torch.randn(3, 2, HEADS, 5 + GRID.size, 13, dtype=torch.float64)
    out = block.mix(q, k, v, GRID)
    for i in (0, 4, 5, 100, 5 + GRID.size - 1):
        scores = [(q[:, g, i, None] * k[:, g]).sum(-1) * 13**-0.5 for g in range(HEADS)]
        shares = [sum(block.p_l[g, l] * scores[g] for g in range(HEADS)).softmax(-1) for l in range(HEADS)]
        for h in range(HEADS):
            share = sum(block.p_w[l, h] * shares[l] for l in range(HEADS))
            torch.testing.assert_close(out[:, h, i], (share[..., None] * v[:, h]).sum(1), rtol=1e-10, atol=1e-12)


def test_rows_add_up_to_what_the_second_mixture_gives_a_head():
    block = talkative()
    q, k = torch.randn(2, 2, HEADS, GRID.size, 13, dtype=torch.float64)
    sums = block.weights(q, k, GRID).sum(-1)
    torch.testing.assert_close(sums, block.p_w.sum(0)[:, None].expand_as(sums), rtol=1e-10, atol=1e-12)
    assert not block.averages and block.weights(q, k, GRID).min() < 0


def test_permuted_heads_are_heads_of_others():
    """With permutations for both mixtures, head h gives v_h the weights of the head that they lead to."""
    block, order = talkative(), torch.tensor([2, 0, 1])
    with torch.no_grad():
        block.p_l.copy_(torch.eye(HEADS))
        block.p_w.copy_(torch.eye(HEADS)[:, order])  # U_h = W of head order⁻¹(h)
    q, k, v = torch.randn(3, 2, HEADS, GRID.size, 13, dtype=torch.float64)
    came_from = block.p_w.argmax(dim=0)
    expected = F.scaled_dot_product_attention(q[:, came_from], k[:, came_from], v)
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, GRID.size, 1000])
def test_chunks_of_any_number_of_rows_give_the_same(rows, monkeypatch):
    block = talkative(causal=True)
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(block(x, GRID).square().sum(), [x, *block.parameters()])
    monkeypatch.setattr(by_rows, "ROWS", rows)
    slopes = torch.autograd.grad(block(x, GRID).square().sum(), [x, *block.parameters()])
    torch.testing.assert_close(slopes, expected, rtol=1e-9, atol=1e-9)


def test_the_backward_uses_the_parameters_of_its_forward():
    """Rows are computed anew in it, when parameters lent by functional_call are gone."""
    block = talkative()
    lent = {name: torch.randn_like(p).requires_grad_() for name, p in block.named_parameters()}
    x = torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    slopes = torch.autograd.grad(torch.func.functional_call(block, lent, (x, GRID)).square().sum(), list(lent.values()))
    block.load_state_dict({name: p.detach() for name, p in lent.items()})
    expected = torch.autograd.grad(block(x, GRID).square().sum(), [block.get_parameter(name) for name in lent])
    torch.testing.assert_close(slopes, expected, rtol=1e-10, atol=1e-10)


def test_little_is_kept_for_the_backward(monkeypatch):
    """No more than queries, keys, values, outputs and mixtures: nothing of the size of scores."""
    monkeypatch.setattr(by_rows, "ROWS", 7)
    block, kept = talkative(), []
    x = torch.randn(1, GRID.size, DIM, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        block(x, GRID)
    assert max(kept) <= max(GRID.size * DIM * 3, 3 * DIM * DIM)


def test_it_costs_what_its_docstring_says():
    assert describe("talking_heads").cost == "2 N² d + 2 N² heads²"
    block = create_block("talking_heads", 24, num_heads=HEADS, device="meta").eval()
    n, x = GRID.size, torch.empty(1, GRID.size, 24, device="meta")
    assert flops(block, x, GRID) == 2 * (2 * n**2 * 24 + 2 * n**2 * HEADS**2 + 4 * n * 24**2)  # and the projections


@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_of_the_second_mixture_adds_the_sum_of_what_is_seen(causal):
    block = create_block("talking_heads", DIM, num_heads=HEADS, causal=causal, mixing_bias=True).double()
    plain = create_block("talking_heads", DIM, num_heads=HEADS, causal=causal).double()
    q, k, v = torch.randn(3, 2, HEADS, 5 + GRID.size, 13, dtype=torch.float64)
    torch.testing.assert_close(block.mix(q, k, v, GRID), plain.mix(q, k, v, GRID))  # it starts at 0
    torch.nn.init.normal_(block.b_w)
    more = block.mix(q, k, v, GRID) - plain.mix(q, k, v, GRID)
    for i in range(5 + GRID.size):
        last = max(5, i + 1) if causal else 5 + GRID.size  # prefix tokens see one another
        expected = block.b_w[:, None] * v[:, :, :last].sum(dim=2)
        torch.testing.assert_close(more[:, :, i], expected, rtol=1e-9, atol=1e-9)
