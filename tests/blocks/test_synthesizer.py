import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block, create_layer

GRID = Grid(5, 7)
HEADS, KEY, VALUE = 2, 3, 4
SIZES = dict(dim=HEADS * VALUE, num_heads=HEADS, key_dim=HEADS * KEY)
FORMS = ["dense", "random", "factorized", "mixture"]


def new(form, **options):
    return create_block("synthesizer", **SIZES, form=form, **options).double()


def tokens(prefix=0, grid=GRID):
    shape = 2, HEADS, prefix + grid.size
    return torch.randn(*shape, KEY, dtype=torch.float64), torch.randn(*shape, VALUE, dtype=torch.float64)


def logits(axis, q, place):
    """Of one query (B, heads, d) along an axis, from the tables as they are."""
    if axis.form == "factorized":
        return (axis.left[:, place, None] * axis.right.transpose(1, 2)).sum(-1)[None].expand(len(q), -1, -1)
    dense = torch.einsum("bnd,ndl->bnl", F.relu(q), axis.network) if hasattr(axis, "network") else 0
    random = axis.table[:, place] if hasattr(axis, "table") else 0
    if axis.form == "mixture":
        return (axis.share[0].exp() * dense + axis.share[1].exp() * random) / axis.share.exp().sum()
    return (dense + random).expand(len(q), -1, -1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_at_its_own_length_the_learned_tables_are_the_logits(form, causal):
    block, (q, v) = new(form, length=tuple(GRID), rank=2, causal=causal), tokens()
    for axis in block.axes:
        if form == "mixture":
            axis.share.data = torch.tensor([0.3, -0.9], dtype=torch.float64)
    out = block.mix(q, q[..., :0], v, GRID)
    rows, columns = block.axes
    q, v = q.unflatten(2, GRID), v.unflatten(2, GRID)
    for y, x in [(0, 0), (4, 6), (2, 5), (3, 0)]:
        last = y if causal else 4
        to_rows = logits(rows, q[:, :, y, x], y)[..., : last + 1].softmax(-1)
        expected = 0
        for row in range(last + 1):
            end = x + 1 if causal and row == y else 7
            in_row = logits(columns, q[:, :, row, x], x)[..., :end].softmax(-1)
            expected = expected + to_rows[..., row, None] * (in_row[..., None] * v[:, :, row, :end]).sum(-2)
        torch.testing.assert_close(out[:, :, y * 7 + x], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("form", ["dense", "mixture"])
def test_a_pixel_is_asked_only_by_its_own_column(form):
    block, (q, v) = new(form, length=3), tokens()
    q = q.requires_grad_()
    (slope,) = torch.autograd.grad(block.mix(q, q[..., :0], v, GRID)[:, :, 2 * 7 + 4].square().sum(), q)
    asked = torch.zeros(GRID, dtype=torch.bool)
    asked[:, 4] = True  # its own for the rows, those of each row for the pixel in it
    assert torch.equal((slope != 0).any(-1).any(1).any(0).reshape(GRID), asked)


@pytest.mark.parametrize("form", ["random", "factorized"])
def test_learned_logits_know_nothing_of_the_image(form):
    block = new(form)
    one, other = (block.attention(torch.randn(2, 3 + GRID.size, 8, dtype=torch.float64), GRID) for _ in range(2))
    assert torch.equal(one, other) and block.qkv.out_features == SIZES["dim"]


def test_factorized_logits_are_of_low_rank_at_any_length():
    axis = new("factorized", length=11, rank=3).axes[0]
    for length in (11, 7, 23):
        assert torch.linalg.matrix_rank(axis(torch.empty(0).double(), length)).unique().tolist() == [3]


def test_a_mixture_is_between_both():
    mixture, (q, v) = new("mixture"), tokens(prefix=2)
    for form, share in (("dense", [99, 0]), ("random", [0, 99])):
        pure = new(form)
        for axis, table in zip(mixture.axes, pure.axes):
            axis.share.data = torch.tensor(share).double()
            table.load_state_dict({name: axis.state_dict()[name] for name in table.state_dict()})
        torch.testing.assert_close(mixture.mix(q, q[..., :0], v, GRID), pure.mix(q, q[..., :0], v, GRID))


@pytest.mark.parametrize("form", FORMS)
def test_trained_at_one_size_it_runs_at_another(form):
    layer = create_layer("synthesizer", form=form, length=(8, 5), init_gain=0.5, **SIZES)
    before = [p.clone() for p in layer.block.axes.parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 8, 8, 5)).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(before, layer.block.axes.parameters()))
    for size in [(13, 7), (3, 11), (1, 1)]:
        assert layer(torch.randn(2, 8, *size)).isfinite().all()
    for axis, length in zip(layer.block.axes, (8, 5)):
        if form == "random":
            larger = F.interpolate(axis.table[None], size=(13, 13), mode="bilinear")[0]
            torch.testing.assert_close(axis(torch.empty(0), 13)[:, 0], larger)
            assert torch.equal(axis(torch.empty(0), length)[:, 0], axis.table)
