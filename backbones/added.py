"""What blocks bring to a model: which of its parameters are theirs, and which of these weight decay leaves alone."""

from torch import nn

from vision_attn import Gate, Mixer
from vision_attn.layout import Residual


class NoWeightDecay:
    """A model's ``no_weight_decay``, which timm asks for names: a set that copies and pickles with the model."""

    def __init__(self, names: set[str]):
        self.names = frozenset(names)

    def __call__(self) -> set[str]:
        return set(self.names)


def spare_tables(model: nn.Module) -> nn.Module:
    """Makes ``model.no_weight_decay()`` name the learned tokens and tables of its blocks beside its own; returns it."""
    own = getattr(model, "no_weight_decay", set)()
    theirs = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name in getattr(module, "undecayed", ())
        if getattr(module, name, None) is not None
    }
    if theirs:
        model.no_weight_decay = NoWeightDecay({*own, *theirs})
    return model


def new_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that blocks of the zoo brought to ``model``.

    Of a layer or a gate: all. Of a mixer in the place of self-attention: all but ``proj``, the norms of queries and
    keys, and a ``qkv`` of three times the width, which are the host's.
    """
    brought, inside = set(), ()
    for path, module in model.named_modules():
        if path.startswith(inside) or not isinstance(module, (Residual, Gate, Mixer)):
            continue
        prefix, hosts = f"{path}." if path else "", ()
        inside += (prefix,)
        if isinstance(module, Mixer):
            qkv = getattr(module, "qkv", None)
            fused = isinstance(qkv, nn.Linear) and qkv.out_features == 3 * module.dim
            hosts = ("proj", "q_norm", "k_norm", *(("qkv",) if fused else ()))
        brought |= {prefix + name for name, _ in module.named_parameters() if name.partition(".")[0] not in hosts}
    return brought
