import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_attn import Grid, create_block
from vision_attn.cost import parameters

GRID = Grid(7, 11)
DIM = 23


def trained(block):
    with torch.no_grad():
        for p in block.parameters():
            p += 0.3 * torch.randn_like(p)
    return block.double()


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_formula_of_the_paper_pixel_by_pixel(causal):
    block = trained(create_block("single_head", DIM, boom=3, causal=causal))
    gates, x = block.gates, torch.randn(GRID.size, DIM, dtype=torch.float64)

    def norm(layer, z):
        return (z - z.mean()) / (z.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias

    f, c = (gates.over.weight @ gates.v_gate.sigmoid() + gates.over.bias).view(2, DIM)
    q = [gates.q_gate.sigmoid() * norm(gates.norm, block.qkv.weight @ p + block.qkv.bias) for p in x]
    k, v = x * gates.k_gate.sigmoid(), x * f.sigmoid() * torch.tanh(c)
    out = block(x[None], GRID)[0]
    for i in range(0, GRID.size, 5):
        seen = i + 1 if causal else GRID.size
        attended = torch.stack([q[i] @ key / DIM**0.5 for key in k[:seen]]).softmax(0) @ v[:seen]
        wide = F.gelu(block.proj.weight @ norm(block.norm, x[i] + attended) + block.proj.bias)
        wanted = attended + wide[:DIM] + wide[DIM : 2 * DIM] + wide[2 * DIM :]
        torch.testing.assert_close(out[i], wanted, rtol=1e-9, atol=1e-11)


def test_with_gates_that_are_open_it_is_torchs_attention():
    """One head, keys and values that are the pixels: MultiheadAttention with matrices that are the identity."""
    block = trained(create_block("single_head", DIM))
    theirs = nn.MultiheadAttention(DIM, 1, batch_first=True, dtype=torch.float64)
    eye = torch.eye(DIM, dtype=torch.float64)
    with torch.no_grad():
        for gate in (block.gates.q_gate, block.gates.k_gate):
            gate.fill_(torch.inf)
        block.gates.over.weight.zero_(), block.gates.over.bias.fill_(torch.inf)
        block.proj.weight.zero_(), block.proj.bias.zero_()  # the Boom layer is silent
        theirs.in_proj_weight.copy_(eye.repeat(3, 1)), theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(eye), theirs.out_proj.bias.zero_()
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    wanted, _ = theirs(block.gates.norm(F.linear(x, block.qkv.weight, block.qkv.bias)), x, x)
    torch.testing.assert_close(block(x, GRID), wanted, rtol=1e-9, atol=1e-11)


def test_only_queries_have_a_matrix():
    block = create_block("single_head", DIM, boom=3)
    assert block.num_heads == 1 and block.scale == DIM**-0.5
    queries, norms, gates = DIM * (DIM + 1), 2 * 2 * DIM, 3 * DIM
    over, boom = 2 * DIM * (DIM + 1), 3 * DIM * (DIM + 1)
    assert parameters(block) == queries + norms + gates + over + boom
    x = torch.randn(2, GRID.size, DIM)
    _, k, v = block.heads(x, GRID)
    assert torch.equal(k[:, 0], x / 2)  # σ(0)
    torch.testing.assert_close(v[:, 0] / x, (v[:1, 0, :1] / x[:1, :1]).expand_as(x))  # a factor for each channel
    assert parameters(create_block("single_head", DIM, key_dim=DIM - 4)) > parameters(block) - 4 * (DIM + 1)


def test_gates_start_half_open_and_learn():
    block = create_block("single_head", DIM)
    block(torch.randn(2, GRID.size, DIM), GRID).square().sum().backward()
    for gate in (block.gates.q_gate, block.gates.k_gate, block.gates.v_gate):
        assert (gate == 0).all() and gate.grad.abs().max() > 0


def test_heads_can_be_given():
    block = trained(create_block("single_head", 22, num_heads=2))
    x = torch.randn(2, GRID.size, 22, dtype=torch.float64)
    assert block.attention(x, GRID).shape == (2, 2, GRID.size, GRID.size)
    assert not torch.equal(*block.attention(x, GRID).unbind(1))


@pytest.mark.parametrize("boom", [0, 1.5, None])
def test_the_number_of_chunks_is_checked(boom):
    with pytest.raises(ValueError, match=f"boom={boom}"):
        create_block("single_head", DIM, boom=boom)


def test_weights_from_when_the_gates_were_a_part_of_qkv_load_strictly():
    block, other = trained(create_block("single_head", DIM)), create_block("single_head", DIM).double()
    state = {name.replace("gates.", "qkv."): value for name, value in block.state_dict().items()}
    host = nn.ModuleDict({"attn": other})
    host.load_state_dict({f"attn.{name}": value for name, value in state.items()})
    x = torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    assert torch.equal(other(x, GRID), block(x, GRID))
