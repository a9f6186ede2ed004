"""ResNets with attention: ``<resnet>_<block>`` for every block of the zoo, for example ``resnet50_cbam``.

Gates sit in timm's own slot of every residual block, after the last norm and before the addition, as CBAM and GCNet
have it. Mixers follow the second and third stage, as non-local blocks do: there a map is small enough to mix and
large enough to gain.
"""

from fnmatch import fnmatchcase

from timm.models.resnet import ResNet

from vision_attn import Gate, create_layer
from vision_attn.zoo import block_class

from .added import spare_tables
from .hosts import options_within
from .insert import insert
from .named import register_stock

__all__ = []
STOCK = ("resnet18", "resnet50", "resnet101", "cifar_resnet20", "cifar_resnet32", "cifar_resnet56")


def add_attention(model: ResNet, block: str, at: str | list[str] | None = None, **options) -> ResNet:
    """Adds ``block`` to a ResNet fresh from its constructor.

    Args:
        model: any of timm's ResNets.
        block: one of `vision_attn.list_blocks`.
        at: residual blocks ("layer3.*": the layer sits in their slot) or stages ("layer3": it follows the stage), one
            wildcard or several. None: every residual block for gates, stages 2 and 3 for mixers.
        options: of the block and of its layer.

    Raises:
        ValueError: ``at`` matches neither; an option is out of range.
    """
    if at is None:
        at = "layer*.*" if issubclass(block_class(block), Gate) else ["layer2", "layer3"]
    stages = {name: stage for name, stage in model.named_children() if name.startswith("layer")}
    slots = {f"{name}.{i}": part for name, stage in stages.items() for i, part in stage.named_children()}
    behind, within = [], []
    for pattern in ([at] if isinstance(at, str) else at) or [""]:  # an empty list matches nothing either
        could, found = (slots, within) if "." in pattern else (stages, behind)
        hits = [name for name in could if fnmatchcase(name, pattern)]
        if not hits:
            raise ValueError(
                f"at={at!r}: {pattern!r} matches none of the stages {', '.join(stages)} "
                f"or their parts {', '.join(slots)}"
            )
        found += hits
    for name in dict.fromkeys(within):
        last = getattr(slots[name], "conv3", None) or slots[name].conv2
        slots[name].se = create_layer(block, last.out_channels, **options_within(last, options))
    if behind:
        insert(model, block, behind, **options)
    return spare_tables(model)


for stock in STOCK:
    taps = 4 if stock.startswith("cifar") else 5  # the stem and its three or four stages
    register_stock(stock, add_attention, __name__, feature_cfg=dict(out_indices=tuple(range(taps))))
