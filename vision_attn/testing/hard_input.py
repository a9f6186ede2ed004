"""Input that breaks careless code: odd sizes, narrow types, huge and tiny numbers, unusual memory."""

import copy
import itertools

import torch

from ..grid import Grid
from .case import GRID, PREFIXES, holds_for
from .oracle import definition_of, sides

SIZES = "1×1 1×7 7×1 2×3 3×2 5×5 7×11 11×5 13×17 16×16 19×8 8×23 1×67 31×33".split()


def one_huge(x):
    """The last pixel, all its channels."""
    x = x.clone()
    (x[:, -1] if x.ndim == 3 else x[..., -1, -1]).mul_(1e4)
    return x


TAME = {"normal": lambda x: x, "zeros": torch.zeros_like, "constant": torch.ones_like, "×1e-6": lambda x: 1e-6 * x}
HARD = {**TAME, "×1e3": lambda x: 1e3 * x, "one huge pixel": one_huge}
WAYS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.mT.contiguous().mT if x.ndim == 3 else x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda x: (x[:, :1] if x.ndim == 3 else x[..., :1]).expand(x.shape),  # positions all alike
    "empty batch": lambda x: x[:0],
    "training": lambda x: x,
    "autocast": lambda x: x,
    "autocast in float16": lambda x: x,
}
UNUSED = dict(allow_unused=True, materialize_grads=True)  # a parameter of an empty batch may be


@holds_for("any", slow=True)
def hard_input_gives_finite_numbers(case):
    """Hard input of 14 sizes, four types and any layout gives the right shape and type, finite where the definition is.

    The kinds of input are the images of one batch.
    """
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        block = case.block(**case.wide_keys).to(dtype)
        for size, prefix in itertools.product(SIZES, PREFIXES if case.is_mixer else [0]):
            grid = Grid(*map(int, size.split("×")))
            plain = torch.cat([change(case.input(grid, prefix, batch=1)) for change in HARD.values()]).to(dtype)
            for way, lay in WAYS.items():
                half = {"autocast": torch.bfloat16, "autocast in float16": torch.float16}.get(way)
                if half and dtype != torch.float32:
                    continue
                x = lay(plain)
                case.trials += max(1, len(x)) - 1
                with case.trying(grid=size, prefix=prefix, dtype=dtype, input=way):
                    block.train(way == "training")
                    found = answers(case, block, x, grid, half)
                    out, slopes = found[0], found[1:]
                    assert out.shape == x.shape and out.device == x.device
                    assert out.dtype in ([torch.float32, half] if half else [dtype])
                    wanted = [x, *block.parameters()]
                    assert all(slope.shape == t.shape and slope.dtype == t.dtype for slope, t in zip(slopes, wanted))
                    if all(t.isfinite().all() for t in found):
                        continue
                    exact, same = (definition_of(case, block, x, grid, t) for t in (torch.float64, half or dtype))
                    assert_finite_where(found, exact, same)
                    tame = x[: len(TAME)]
                    exact = definition_of(case, block, tame, grid, torch.float64)
                    assert_finite_where(answers(case, block, tame, grid, half), exact, exact)


LARGE = {**TAME, "×1e3": HARD["×1e3"], "×1e3, none negative": lambda x: 1e3 * x.abs()}


@holds_for("any")
def gradients_in_float16_are_finite_where_they_fit(case):
    """Features in the thousands give finite gradients in float16, where these and those between layers fit into it.

    Of the sum of an image's outputs. A parameter's gradient fits as a whole or not: with one infinite number a step is
    left out. Of three inputs one must do so: where two scores of thousands lie a bit apart, a slope is large indeed.
    """
    block = case.block(**case.wide_keys).half()
    for size, prefix in itertools.product(("1×7", "5×5", "13×17"), PREFIXES[:2] if case.is_mixer else [0]):
        grid = Grid(*map(int, size.split("×")))
        for kind, change in LARGE.items():
            for way, half in ((block, None), (copy.deepcopy(block).float(), torch.float16)):
                with case.trying(grid=size, prefix=prefix, input=kind, autocast=half is not None):
                    inputs = (change(case.input(grid, prefix, batch=1)).half() for _ in range(3))
                    assert any(has_finite_slopes(case, way, x, grid, half) for x in inputs)


def has_finite_slopes(case, block, x, grid, half):
    """Whether gradients in float16 are finite, but where they or those between layers do not fit into it."""
    _, *slopes = answers(case, block, x.float() if half else x, grid, half, direction=1.0)
    if all(slope.isfinite().all() for slope in slopes):
        return True
    exact, between = slopes_at_float16(case, block, x, grid)
    most = torch.finfo(torch.float16).max
    asked = [between <= 0.9 * most and (t.abs() <= most / 4).all() for t in exact]
    return all(t.isfinite().all() for t, must in zip(slopes, asked) if must)


def slopes_at_float16(case, block, x, grid):
    """Gradients in float64 at what float16 rounds activations to, and the largest that passes between layers.

    Where large scores make one-hot weights, a step in the last bit may change which one it is.
    """
    block, between = copy.deepcopy(block).double(), [0.0]

    def rounded(t):
        if isinstance(t, tuple):
            return tuple(map(rounded, t))
        if not isinstance(t, torch.Tensor) or not t.requires_grad or not t.numel():
            return t
        t = t + (t.half() - t).detach()
        t.register_hook(lambda slope: between.append(slope.abs().max().item()))
        return t

    for layer in block.modules():
        if layer is not block and any(True for _ in layer.parameters(recurse=False)):
            layer.register_forward_pre_hook(lambda _, inputs: rounded(inputs))
            layer.register_forward_hook(lambda _, inputs, out: rounded(out))
    _, *slopes = answers(case, block, x.double(), grid, None, direction=1.0)
    return slopes, max(between)


def answers(case, block, x, grid, half, direction=None):
    """Output and gradients of its mean over an image, or in a direction, under autocast to ``half`` if it is a type."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", half, enabled=half is not None):
        out = case.run(block, x, grid)
    direction = torch.full_like(out, 1 / max(1, out[:1].numel()) if direction is None else direction)
    return [out, *torch.autograd.grad(out, [x, *block.parameters()], direction, **UNUSED)]


def assert_finite_where(found, exact, same):
    """Where the definition in float64 is; gradients only where ``same`` is too, as sums of large numbers overflow."""
    names = ["output", "gradient of x", *["gradient of a parameter"] * len(found)]
    for name, t, e, s in zip(names, found, exact, same):
        must = e.abs() < torch.finfo(t.dtype).max / 16  # what is larger may overflow on the way
        if name != "output":
            must &= s.isfinite()
        assert (t.isfinite() | ~must).all(), f"{name} is not finite where the definition is"


@holds_for("any")
def large_scores_stay_finite(case):
    """Scores beyond the range of float16 and of exp give finite outputs, where the outputs have that range."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        block = case.block().to(dtype)
        exact_block = copy.deepcopy(block).double()
        with case.trying(dtype=dtype):
            for (fast, _, inputs), (_, exact, _) in zip(sides(block, GRID, 5), sides(exact_block, GRID, 5)):
                inputs = [(300 * x).to(dtype).requires_grad_() for x in inputs]
                out = fast(*inputs)
                most = exact(*(x.detach().double() for x in inputs)).abs().max()
                if most < torch.finfo(dtype).max / 16:
                    assert out.isfinite().all()
                    slopes = torch.autograd.grad(out.float().mean(), inputs, **UNUSED)  # some make no use of q or k
                    assert all(slope.isfinite().all() for slope in slopes)


@holds_for("any")
def gradients_are_finite_where_the_map_is_zero(case):
    """A map of zeros, as behind a new norm of weight 0, with biases of 0, gives finite gradients."""
    layer = case.layer().train()
    with torch.no_grad():
        for name, p in layer.block.named_parameters():
            p.mul_(not name.endswith("bias"))
    with case.trying(grid=GRID):
        x = torch.zeros_like(case.map(GRID)).requires_grad_()
        layer(x).square().sum().backward()
        for slope in [x.grad, *(p.grad for p in layer.parameters())]:
            assert slope.isfinite().all()
