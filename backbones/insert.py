"""Adds a layer behind stages or blocks of a model that exists already.

Every original parameter keeps its name, and the function stays the same bit for bit until the layer is trained.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from vision_attn import Gate, OnTokens, create_block, create_layer
from vision_attn.hooks import Behind
from vision_attn.zoo import block_class, name_of, taken_apart

from .added import spare_tables
from .grids import grid_source
from .hosts import input_size_of, last_of, options_within, refuse_wrapped, resolve, stages
from .places import offers, places


def insert(
    model: nn.Module,
    block: str | type,
    at: str | Iterable[str] | None = None,
    *,
    init_gain: float = 0.0,
    input_size: tuple[int, int, int] | None = None,
    grid: str | Callable[[Tensor], tuple[int, int]] | None = None,
    **options,
) -> nn.Module:
    """Adds ``block`` behind modules of ``model`` and returns the model.

    With ``init_gain=0`` the model stays the same function, bit for bit, until trained. The layer at ``layer3``
    becomes the parameters ``layer3.<last block>.attn_<block>.*``; all others keep their names. The model is run
    on zeros, in eval mode, to learn the shapes: once where it lists its stages, else on wide and tall images too.

    Args:
        block: one of `vision_attn.list_blocks`, a class of blocks, or one of layers (`vision_attn.layer`).
        at: names of modules, with wildcards that do not cross dots ("layer3.*"), or several; None: after every
            stage of a convolutional network that timm lists in ``feature_info``, every block of a ViT, also where
            such a network is part of the model. A gate leaves out the last of several blocks where a class token is
            read: it changes patch tokens, and nothing would read them. What a wildcard matches that gives neither a
            map nor tokens, as a head that gives a list, is passed over; a name in full is not.
        init_gain: 0 starts as identity, 1 as the block was published.
        input_size: (channels, height, width) of an image the model takes; None: what the model says. (torchvision's ViT
            takes one size, `any_size` lets it take others; Hugging Face's want ``interpolate_pos_encoding=True``.)
        grid: where the grid of a ViT's tokens comes from: the name of the module that gives the patches as a map
            (B, C, height, width), or a function of the images (B, channels, H, W) that gives (height, width), at
            the top of a module if the model is to be pickled. None: timm's patch embedding, or such a module where one
            is seen (torchvision's ``conv_proj``, Hugging Face's ``embeddings.patch_embeddings.projection``). Prefix
            tokens are those before the grid's.
        options: of the block, whose device and type are the model's.

    Raises:
        ValueError: ``at`` matches nothing (what could match is listed: the stages, or, where the model lists none, what
            is seen to give maps or tokens) or a place where no layer can be (one that works is named): its output is
            neither a feature map nor tokens, or its channels can't be told; it is used in several places, runs all
            its children, or goes when the model is fused. The grid of a place's tokens is not found. A block of this
            name is already there; an option is out of range; the model takes no image of ``input_size``; it is
            compiled, or wrapped for several processes.
    """
    refuse_wrapped(model)
    block, options = taken_apart(block, options)
    init_gain = options.pop("init_gain", init_gain)
    could = stages(model)
    reads_class_token = any(getattr(part, "global_pool", None) == "token" for part in model.modules())
    if at is None and issubclass(block_class(block), Gate) and reads_class_token:
        could = could[:-1] or could
    modules = dict(model.named_modules(remove_duplicate=False))
    at = at if at is None or isinstance(at, str) else list(at)
    found = resolve(model, at, could, modules, offers=lambda: offers(model, input_size))
    names = list(dict.fromkeys(last_of(model, name) for name in found))  # "layer3" and "layer3.1" may be the same place
    size = input_size or input_size_of(model)
    child, ready, options = f"attn_{name_of(block)}", [], options_within(model, options)
    for name in names:
        if hasattr(model.get_submodule(name), child):
            raise ValueError(f"at={at!r}: {name} already has a {name_of(block)}")
    in_full = {last_of(model, name) for name in found if name in ([at] if isinstance(at, str) else at or could)}
    met = places(model, names, size, passed_over=set(names) - in_full)
    tokens = {name: place.shape[1] for name, place in met.items() if len(place.shape) == 3}
    try:
        source = grid_source(model, tokens, grid, size) if tokens else None
    except ValueError as error:
        maps = ", ".join(name for name in met if name not in tokens)
        raise ValueError(f"{error}; or try {maps}" if maps else str(error)) from error
    for name, (shape, channel_axis) in met.items():
        target = model.get_submodule(name)
        if name in tokens:
            source.follow(target)
            layer = OnTokens(create_block(block, shape[-1], **options), init_gain)
            ready.append((target, layer, Behind(child, source=source)))
        else:
            layer = create_layer(block, shape[channel_axis], init_gain=init_gain, **options)
            ready.append((target, layer, Behind(child, channels_last=channel_axis == 3)))
    for target, layer, behind in ready:  # all of them or, where one can't be made, none
        target.add_module(child, layer.train(model.training))
        target.register_forward_hook(behind)
    return spare_tables(model)
