import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block

GRID = Grid(5, 7)
HEADS, WIDTH = 2, 4
DIM = HEADS * WIDTH


def new(labels=True, forms=True, **options):
    block = create_block("global_local", DIM, num_heads=HEADS, **{"windows": (2, 3), "kernel_size": (3, 5), **options})
    with torch.no_grad():
        for table in (block.of_windows, block.of_pixels):
            table.normal_() if labels else table.zero_()
        if forms:
            block.forms.normal_()
    return block.double()


def random_qkv(tokens=GRID.size):
    return torch.randn(3, 2, HEADS, tokens, WIDTH, dtype=torch.float64)


def test_one_window_without_labels_is_a_mean_that_reads_all_and_is_read():
    block, (q, k, v) = new(labels=False, forms=False, windows=1, kernel_size=1), random_qkv()
    known = torch.cat([k, v], dim=-1)
    mean = known.mean(dim=2, keepdim=True)
    context = torch.cat([mean, known], dim=2)
    read = F.scaled_dot_product_attention(q.mean(dim=2, keepdim=True), context[..., :WIDTH], context)
    out = block.mix(q, k, v, GRID)
    for i in range(GRID.size):
        seen = torch.cat([read, known[:, :, [i]]], dim=2)
        expected = F.scaled_dot_product_attention(q[:, :, [i]], seen[..., :WIDTH], seen[..., WIDTH:])
        torch.testing.assert_close(out[:, :, [i]], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("prefix", [0, 2])
def test_four_pieces_with_forms_and_labels_of_their_own(prefix):
    """In loops over global tokens, then over the keys of a pixel: row y is in window 2 y // 5, column x in 3 x // 7."""
    block, (q, k, v) = new(), random_qkv(prefix + GRID.size)
    out, (to_global, to_local, from_local) = block.mix(q, k, v, GRID), block.forms
    window = {(y, x): (2 * y // 5, 3 * x // 7) for y in range(5) for x in range(7)}
    token = {place: prefix + i for i, place in enumerate(window)}
    own = {w: [token[place] for place in window if window[place] == w] for w in sorted(set(window.values()))}
    mean_q, mean_k, mean_v = ({w: t[:, :, own[w]].mean(dim=2) for w in own} for t in (q, k, v))

    def score(query, form, key, label):
        return ((query[:, :, None] @ form)[:, :, 0] * key).sum(-1) + label

    def of_windows(number, here, there):
        return block.of_windows[number][:, there[0] - here[0] + 1, there[1] - here[1] + 2]

    def taken(scores, values):
        weights = (torch.stack(scores, dim=-1) * WIDTH**-0.5).softmax(dim=-1)
        return (weights[..., None] * torch.stack(values, dim=-2)).sum(-2)

    read_k, read_v = {}, {}
    for w, query in mean_q.items():
        scores = [score(query, to_global, mean_k[other], of_windows(0, w, other)) for other in own]
        scores += [score(query, to_local, k[:, :, i], 0) for i in range(prefix)]
        scores += [score(query, to_local, k[:, :, i], of_windows(1, w, window[place])) for place, i in token.items()]
        read_k[w] = taken(scores, [*mean_k.values(), *k.unbind(2)])
        read_v[w] = taken(scores, [*mean_v.values(), *v.unbind(2)])
    of_prefix = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
    torch.testing.assert_close(out[:, :, :prefix], of_prefix, rtol=1e-10, atol=1e-12)
    for y, x in [(0, 0), (2, 3), (4, 5)]:
        query, here, values = q[:, :, token[y, x]], window[y, x], list(read_v.values())
        scores = [score(query, from_local, read_k[w], of_windows(2, here, w)) for w in own]
        for i in range(prefix):
            scores.append((query * k[:, :, i]).sum(-1))
            values.append(v[:, :, i])
        for (ky, kx), i in token.items():
            if abs(ky - y) <= 1 and abs(kx - x) <= 2:
                scores.append((query * k[:, :, i]).sum(-1) + block.of_pixels[:, ky - y + 1, kx - x + 2])
                values.append(v[:, :, i])
        torch.testing.assert_close(out[:, :, token[y, x]], taken(scores, values), rtol=1e-10, atol=1e-12)


def test_a_label_can_point_at_the_pixel_beside_or_at_the_window_beside():
    block, (q, k, v) = new(labels=False), random_qkv()
    with torch.no_grad():
        block.of_pixels[:, 2, 0] = 1e6  # one down, two left
    out, image = (t.unflatten(2, GRID) for t in (block.mix(q, k, v, GRID), v))
    torch.testing.assert_close(out[:, :, :4, 2:], image[:, :, 1:, :5], rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        block.of_pixels.zero_()
        block.of_windows[0, :, 1, 2] = block.of_windows[2, :, 0, 3] = 1e6  # reads itself; asks one up, one right
    out = block.mix(q, k, v, GRID).unflatten(2, GRID)
    mean = image[:, :, :3, 3:5].mean(dim=(2, 3))  # of the window above and right of row 3, column 2
    torch.testing.assert_close(out[:, :, 3, 2], mean, rtol=1e-11, atol=1e-13)


def test_every_pixel_hears_every_other_and_every_label_is_felt():
    block, x = new(windows=(1, 2), kernel_size=1), torch.randn(1, GRID.size, DIM, dtype=torch.float64)
    assert (block.attention(x, GRID) > 0).all()
    labelled = new()
    labels = labelled.of_windows, labelled.of_pixels
    assert all((slope != 0).all() for slope in torch.autograd.grad(labelled(x, GRID).square().sum(), labels))


def test_windows_without_pixels_do_not_count():
    """Of 5 × 7 windows on 2 × 3 pixels each pixel has one, a few apart: labels of the others are not felt."""
    block, grid = new(windows=(5, 7), kernel_size=1), Grid(2, 3)
    owner, size = block.owners(grid, "cpu")
    assert sorted(owner.tolist()) == size.nonzero().flatten().tolist() and size.sum() == 6
    out = block.mix(*random_qkv(6), grid)
    (slope,) = torch.autograd.grad(out.square().sum(), block.of_windows)
    felt, places = (slope != 0)[2].any(0), [(i // 7, i % 7) for i in owner.tolist()]
    offsets = {(there[0] - here[0] + 4, there[1] - here[1] + 6) for here in places for there in places}
    assert {tuple(place) for place in felt.nonzero().tolist()} == offsets
