"""What torch.fx records as one step of a graph."""

from functools import wraps

from torch import nn
from torch.fx import Proxy


class Leaf(nn.Module):
    """A module that torch.fx does not look into: what it does depends on shapes, and checks them.

    To some of its tracers one can say so, but not to all; so ``forward`` itself records its call.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            cls.forward = recorded(cls.forward)


def recorded(forward):
    @wraps(forward)
    def record_or_run(self, x, *args, **kwargs):
        if isinstance(x, Proxy):
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, *args), kwargs)
        return forward(self, x, *args, **kwargs)

    return record_or_run
