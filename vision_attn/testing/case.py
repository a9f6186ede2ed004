"""A block under test, and the list of properties that it is tested for."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..engines.route import route
from ..gate import Gate
from ..grid import Grid
from ..layout import OnMap
from ..mixer import Mixer, PatternMixer

BATCH, HEADS, KEY, VALUE = 2, 3, 7, 11  # of mixers: queries, keys and values of (BATCH, HEADS, tokens, KEY or VALUE)
CHANNELS = 19  # of gates
GRIDS = [Grid(1, 1), Grid(1, 23), Grid(29, 1), Grid(13, 17)]  # none is a multiple of a window
PREFIXES = [0, 1, 5]
SMALL, GRID = Grid(2, 3), GRIDS[-1]
EXAMPLES = 200  # that hypothesis draws


@dataclass
class Case:
    """A block's class with options, and how to run it.

    Args:
        block_class: a subclass of `Mixer` or `Gate`.
        options: keyword arguments of it.
        unfelt: names of parameters that the output does not depend on: behind a softmax that cannot see a constant.
    """

    block_class: type
    options: dict = field(default_factory=dict)
    unfelt: frozenset[str] = frozenset()
    trials: int = 0

    @property
    def is_mixer(self) -> bool:
        return issubclass(self.block_class, Mixer)

    @property
    def sizes(self) -> dict:
        if not self.is_mixer:
            return dict(dim=CHANNELS)
        return dict(dim=HEADS * VALUE, num_heads=HEADS, key_dim=HEADS * KEY)

    @property
    def wide_keys(self) -> dict:
        """Keys as wide as values, the default, which torch's kernels want; `sizes` are for all other routes."""
        return dict(key_dim=HEADS * VALUE) if self.is_mixer else {}

    def new(self, **more) -> Mixer | Gate:
        """The block as its class makes it."""
        return self.block_class(**{**self.sizes, **self.options, **more})

    def block(self, **more) -> Mixer | Gate:
        """In float64 and eval mode, with no parameter or statistic at a special initial value."""
        return lived_in(self.new(**more))

    def layer(self, **more) -> OnMap:
        """`block` as a layer on maps, with a gain as after training."""
        return lived_in(OnMap(self.new(**more)))

    def input(self, grid, prefix: int = 5, batch: int = BATCH) -> Tensor:
        """Tokens (B, P + H·W, dim) for a mixer, a map (B, dim, H, W) for a gate."""
        shape = (prefix + grid[0] * grid[1], self.sizes["dim"]) if self.is_mixer else (self.sizes["dim"], *grid)
        return torch.randn(batch, *shape, dtype=torch.float64)

    def map(self, grid) -> Tensor:
        return torch.randn(BATCH, self.sizes["dim"], *grid, dtype=torch.float64)

    def run(self, block, x, grid) -> Tensor:
        return block(x, grid) if self.is_mixer else block(x)

    @contextmanager
    def trying(self, **example) -> Iterator[None]:
        """One trial: counted, and named if it fails."""
        self.trials += 1
        try:
            yield
        except Exception as error:
            error.add_note(f"{self} with " + ", ".join(f"{name} {value}" for name, value in example.items()))
            raise

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in {**self.sizes, **self.options}.items())
        name = self.block_class.__name__
        return f"{self.block_class.__module__.rpartition('.')[2]}.{name}({given})"


@dataclass(frozen=True)
class Property:
    """Something that must hold: ``check`` raises where it does not."""

    check: Callable[[Case], None]
    applies: Callable[[Case], bool]
    slow: bool

    @property
    def name(self) -> str:
        return self.check.__name__

    @property
    def sentence(self) -> str:
        return self.check.__doc__.partition("\n")[0].rstrip(".")


PROPERTIES: list[Property] = []

KINDS = {
    "any": lambda case: True,
    "mixer": lambda case: case.is_mixer,
    "gate": lambda case: not case.is_mixer,
    "average": lambda case: all_steps(case, lambda step: step.averages),
    "causal": lambda case: case.is_mixer and case.new(device="meta").causal,
    "softmax": lambda case: all_steps(case, is_softmax_of_products),
    "routed": lambda case: case.is_mixer and any(hasattr(s, "pattern") for s in case.new(device="meta").steps),
    "pattern": lambda case: case.is_mixer and any(isinstance(s, PatternMixer) for s in case.new(device="meta").steps),
}


def all_steps(case: Case, holds: Callable[[Mixer], bool]) -> bool:
    """Whether it is a mixer with steps, and something holds for all of them."""
    steps = case.new(device="meta").steps if case.is_mixer else ()
    return bool(steps) and all(map(holds, steps))


def is_softmax_of_products(step: Mixer) -> bool:
    """Whether its scores are q · k alone, of what a pattern allows."""
    own = {name.partition(".")[0] for name, _ in step.named_parameters()}
    return isinstance(step, PatternMixer) and own <= {"qkv", "proj", "q_norm", "k_norm"}


def holds_for(kind: str, slow: bool = False) -> Callable:
    """Enters a function of a `Case` into `PROPERTIES`, for the kind of block it is about.

    Patterns are computed by their key sets, as on large grids: at the sizes of a trial ``auto`` takes their mask, which
    the definition has, too. `routes_give_the_same` asks for all routes.
    """

    def enter(check):
        @functools.wraps(check)
        def by_key_sets(case):
            with route("union"):
                check(case)

        PROPERTIES.append(Property(by_key_sets, KINDS[kind], slow))
        return by_key_sets

    return enter


def lived_in(module: nn.Module) -> nn.Module:
    """The module in float64 and eval mode, as if trained for a while."""
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p += torch.randn_like(p).mul(0.3).add(0.1)
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    return module
