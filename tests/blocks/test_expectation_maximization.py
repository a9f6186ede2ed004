import torch

from vision_attn import create_block, describe
from vision_attn.cost import flops

DIM = 23


def test_bases_are_64_of_unit_norm_and_stay_so():
    block = create_block("expectation_maximization", DIM).double()
    assert block.iterations == 3
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(3):
        assert block.bases.value.shape == (DIM, 64)
        norms = block.bases.value.norm(dim=0)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=3e-6)  # the authors' eps is 1e-6
        block(torch.randn(2, DIM, 7, 11, dtype=torch.float64)).square().mean().backward()
        optimizer.step()


def test_responsibilities_of_a_pixel_sum_to_one():
    block = create_block("expectation_maximization", DIM, bases=5).double()
    z, mu = block.fit(torch.randn(2, DIM, 77, dtype=torch.float64))
    assert z.shape == (2, 77, 5) and mu.shape == (2, DIM, 5)
    torch.testing.assert_close(z.sum(-1), torch.ones(2, 77, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(mu.norm(dim=1), torch.ones(2, 5, dtype=torch.float64), rtol=0, atol=1e-4)


def gradients(grad):
    torch.manual_seed(0)
    block = create_block("expectation_maximization", DIM, bases=5, grad=grad)
    x = torch.randn(2, DIM, 7, 11, requires_grad=True)
    out = block(x)
    out.square().sum().backward()
    return block, x, out


def test_as_published_what_comes_before_the_iterations_never_learns():
    """The authors run them without gradient: the rest of the network feels the block only through the identity."""
    block, x, out = gradients("paper")
    assert block.before.weight.grad is None and block.before.bias.grad is None
    assert block.after.weight.grad.abs().max() > 0
    torch.testing.assert_close(x.grad, 2 * out.detach())


def test_in_full_everything_learns_and_the_output_is_the_same():
    paper, _, published = gradients("paper")
    block, x, out = gradients("full")
    assert torch.equal(out, published)
    assert all(p.grad.abs().max() > 0 for p in block.parameters())
    assert not torch.allclose(x.grad, 2 * out.detach())


def test_iterations_find_the_clusters():
    """Pixels of a few directions: each basis ends on one of them, and the pixels are redrawn along it."""
    block = create_block("expectation_maximization", DIM, bases=3, iterations=20, temperature=0.1).double()
    directions = torch.linalg.qr(torch.randn(DIM, 3, dtype=torch.float64)).Q
    which = torch.randint(3, (1, 143))
    block.bases.value.copy_(directions + 0.1 * torch.randn_like(directions))
    z, mu = block.fit(directions.T[which].mT)
    assert torch.equal(z.argmax(-1), which)
    torch.testing.assert_close(mu[0], directions, rtol=0, atol=1e-3)


def test_the_order_of_pixels_does_not_matter():
    block = create_block("expectation_maximization", DIM, bases=5).double().eval()
    x, order = torch.randn(2, DIM, 7, 11, dtype=torch.float64), torch.randperm(77)

    def shuffled(x):
        return x.flatten(2)[:, :, order].reshape(x.shape)

    torch.testing.assert_close(block(shuffled(x)), shuffled(block(x)), rtol=1e-9, atol=1e-12)


def test_a_high_temperature_blurs_and_a_low_one_decides():
    x = torch.randn(2, DIM, 7, 11)
    torch.manual_seed(3)
    sure = [create_block("expectation_maximization", DIM, bases=5, temperature=t) for t in (0.01, 1, 100)]
    for block in sure[1:]:
        block.load_state_dict(sure[0].state_dict())
    low, middle, high = (block.attention_map(x).mean() for block in sure)
    assert low > 0.9 and low > middle > high and high < 0.21


def test_parts_are_as_in_the_authors_code():
    block = create_block("expectation_maximization", DIM)
    assert block.before.bias is not None and block.after.bias is None and block.bases.momentum == 0.9


def test_states_from_when_the_first_layer_was_linear_load():
    block, x = create_block("expectation_maximization", DIM, bases=5).eval(), torch.randn(2, DIM, 7, 11)
    state = block.state_dict() | {"before.weight": block.before.weight.detach()[:, :, 0, 0]}
    other = create_block("expectation_maximization", DIM, bases=5).eval()
    other.load_state_dict(state)
    assert torch.equal(other(x), block(x))


def test_it_costs_what_its_docstring_says():
    assert describe("expectation_maximization").cost == "7 N K d"
    x = torch.empty(1, 512, 7, 11, device="meta")
    assert flops(create_block("expectation_maximization", 512, device="meta"), x) == 2 * (
        7 * 77 * 64 * 512 + 2 * 77 * 512**2
    )  # and two projections
