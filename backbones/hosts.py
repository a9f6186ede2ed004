"""What a model that exists already says of itself: its parts, its images, and what it gives for one of them."""

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from timm.models.regnet import RegStage
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

CHAINS = (nn.Sequential.forward, RegStage.forward)  # run all children in turn, each on what the one before it gave
STEMS = ("act", "bn", "conv", "norm", "stem")  # how timm's models name what precedes the first stage


def resolve(
    model, at, could: list[str], among: Iterable[str], inside: bool = False, offers: Callable[[], list[str]] = list
) -> list[str]:
    """Names in ``among`` that ``at`` matches (or, ``inside``, that lie within a match), in the model's order.

    Args:
        could: what is meant by ``at=None``.
        offers: what else could match, asked for where nothing is meant.
    """
    patterns = could if at is None else [at] if isinstance(at, str) else list(at)
    found = []
    for pattern in patterns or [None]:
        hits = [name for name in among if name and pattern is not None and matches(pattern, name, inside)]
        if not hits:
            listed = ", ".join(could) or ", ".join(offers()) or "nothing: it gives no maps and no tokens"
            kind = type(model).__name__
            lost = f"at={at!r}: {kind} lists no stages" if at is None else f"at={at!r}: names no module of {kind}"
            lost = lost if pattern is None else f"at={pattern!r}: matches no module of {kind}"
            raise ValueError(f"{lost}; what could match: {listed}")
        found += hits
    return [name for name in among if name in found]


def matches(pattern: str, name: str, inside: bool) -> bool:
    wanted, parts = pattern.split("."), name.split(".")
    if len(wanted) > len(parts) or (len(wanted) < len(parts) and not inside):
        return False
    return all(fnmatchcase(part, want) for part, want in zip(parts, wanted))


def stages(model: nn.Module) -> list[str]:
    """The stages (or ViT blocks) that a timm model lists as its features, or those in ``model`` do."""
    return [f"{prefix}{name}" for prefix, name, _ in _listed(model) if not name.startswith(STEMS)]


def listed_channels(model: nn.Module) -> dict[str, int | None]:
    """Channels of the modules that a timm model lists as its features, or those in ``model`` do."""
    return {f"{prefix}{name}": channels for prefix, name, channels in _listed(model)}


def _listed(model: nn.Module) -> Iterator[tuple[str, str, int | None]]:
    """Of each timm model that lists its features and is in no other: where it is, their names in it, their channels."""
    modules, within = dict(model.named_modules()), []
    for holder, part in modules.items():
        prefix = f"{holder}." if holder else ""
        if any(prefix.startswith(other) for other in within):
            continue
        for info in getattr(part, "feature_info", None) or ():
            names = info["module"], info["module"].replace(".", "_")  # as timm flattens it for features_only
            if name := next((name for name in names if name and prefix + name in modules), None):  # some list none
                within.append(prefix)
                yield prefix, name, info.get("num_chs")


def is_chain(module: nn.Module) -> bool:
    """Whether it runs its children in turn and does nothing else."""
    return getattr(module.forward, "__func__", None) in CHAINS


def last_of(model: nn.Module, name: str) -> str:
    """The module whose output is that of ``name``: hosts may run the parts of a chain without calling it."""
    module = model.get_submodule(name)
    while is_chain(module) and len(module._modules):
        child = next(reversed(module._modules))
        name, module = f"{name}.{child}", module.get_submodule(child)
    return name


def holders(name: str) -> Iterator[str]:
    """Names of the modules that hold ``name``, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def also_called(model: nn.Module, name: str) -> str | None:
    """Another name of the same module."""
    module, names = model.get_submodule(name), model.named_modules(remove_duplicate=False)
    return next((other for other, same in names if same is module and other != name), None)


def observe(model: nn.Module, names: Iterable[str], image: Tensor) -> dict[str, list]:
    """What the named modules give, call by call, in eval mode; ValueError where the model does not take the image."""
    return {name: [output for *_, output in calls] for name, calls in observing(model, names, image).items()}


def observing(model: nn.Module, names: Iterable[str], image: Tensor) -> dict[str, list[tuple]]:
    """What the named modules are called with and give, (args, kwargs, output) call by call, as `observe`."""
    met: dict[str, list[tuple]] = {name: [] for name in names}
    was_training = {module: module.training for module in model.modules()}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, kwargs, output, calls=calls: calls.append((args, kwargs, output)), with_kwargs=True
        )
        for name, calls in met.items()
    ]
    try:
        with torch.no_grad():
            model.eval()(image)
    except Exception as error:  # whatever the host raises
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"input_size={tuple(image.shape[1:])}: {type(model).__name__} does not take an image of these channels, "
            f"height and width ({type(error).__name__}: {reason}); give those of one that it takes"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    return met


def shapes_of(model: nn.Module, names: Iterable[str], size: tuple[int, int, int]) -> dict[str, list]:
    """Shapes of what the named modules give, call by call, for zeros of (channels, height, width) = ``size``."""
    outputs = observe(model, names, torch.zeros(1, *size, **like(model)))
    return {name: [tuple(getattr(given(output), "shape", ())) for output in calls] for name, calls in outputs.items()}


def given(output):
    """What a module gives: of a tuple with no other tensor, as attention gives it without its weights, the first."""
    if isinstance(output, tuple) and output and not any(isinstance(x, Tensor) for x in tree_leaves(output[1:])):
        return output[0]
    return output


def refuse_wrapped(model: nn.Module) -> None:
    """ValueError for a model that would not notice a new layer."""
    for name, part in model.named_modules():
        at = f"model{'.' * bool(name)}{name}"
        if "_orig_mod" in part._modules or part._compiled_call_impl is not None:
            raise ValueError(
                f"model={type(model).__name__}: {at} is compiled, and would not notice a change; change the model "
                f"itself{f' ({at}._orig_mod)' * ('_orig_mod' in part._modules)}, and compile that after it"
            )
        if isinstance(part, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"model={type(model).__name__}: {at} would not average the gradients of new parameters; change "
                f"{at}.module, and wrap that after it"
            )


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of an image that the model takes; ValueError where it tells no channels."""
    told = tuple(_said(model, "pretrained_cfg").get("input_size") or ())
    stated = _said(model, "image_size") or getattr(
        _said(model, "config"), "image_size", ()
    )  # torchvision, Hugging Face
    stated = (stated, stated) if isinstance(stated, int) else tuple(stated or ())
    size = getattr(_said(model, "patch_embed"), "img_size", None) or told[1:] or stated or (224, 224)
    own = getattr(model, "in_chans", None)
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)  # of an image folded up?
    could = [own] if isinstance(own, int) else [n for n in dict.fromkeys((*told[:1], first)) if n]
    if len(could) > 1:
        could = [channels for channels in could if takes(model, (channels, *size))]
    if not could:
        raise ValueError(
            f"input_size=None: {type(model).__name__} does not tell what images it takes; give input_size=(channels, "
            "height, width), or set its in_chans"
        )
    return could[0], *size


def _said(model: nn.Module, name: str):
    """An attribute of the model, or of the first part of it that has one."""
    return next((value for part in model.modules() if (value := getattr(part, name, None))), {})


def takes(model: nn.Module, size: tuple[int, int, int]) -> bool:
    """Whether the model runs on an image of (channels, height, width) = ``size``."""
    try:
        observe(model, [], torch.zeros(1, *size, **like(model)))
    except ValueError:
        return False
    return True


def like(model: nn.Module) -> dict:
    parameter = next(model.parameters())
    return dict(device=parameter.device, dtype=parameter.dtype)


def options_within(model: nn.Module, options: dict) -> dict:
    """Of a block that becomes part of ``model``: its device and type come along; ValueError if others are asked for."""
    same = like(model)
    for name, own in same.items():
        if name in options:
            raise ValueError(f"{name}={options[name]!r}: is the model's, {own}; move or convert the model instead")
    return {**options, **same}
