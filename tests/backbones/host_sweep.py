"""`backbones.insert` on two models of every module of timm and on torchvision's models: every place right or refused.

    python tests/backbones/host_sweep.py                                  # all: writes a table to results/
    python tests/backbones/host_sweep.py --only 'swin*' --file TABLE      # these anew, the other rows of the table stay

A place is right if the model stays the same function bit for bit, and if the layer, awake, sees the image as it lies:
where a part of the image changes, its input changes at that place, more than it does when another part changes. This
asks no one for axes or grids.
"""

import argparse
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models import list_modules, model_entrypoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import backbones
from training.results import read, write
from vision_attn import OnMap
from vision_attn.layout import Residual

BLOCKS = ("cbam", "criss_cross")  # a gate and a mixer
SMALL = (
    "test_ atto femto pico nano xxs xxtiny xt tiny mini _xs small _ti _t_ _t[0-9] _s[0-9] 050 b0 m0 18 _0 _s".split()
)
SPOTS = ((0.15, 0.85), (0.85, 0.15), (0.85, 0.85), (0.15, 0.15))  # (y, x) of a changed part, in shares of the image


class Host(NamedTuple):
    library: str
    family: str
    name: str

    def made(self) -> Iterator[tuple[nn.Module, tuple[int, int, int]]]:
        """The model, and (channels, height, width) of images to try it at: small and not square first."""
        torch.manual_seed(0)
        if self.library == "torchvision":
            for size in ((96, 160), (224, 224), (300, 300)):
                yield self._of_torchvision(), (3, *size)
            return
        cfg = timm.get_pretrained_cfg(self.name)
        channels, *native = cfg.input_size
        if not cfg.fixed_input_size:
            yield timm.create_model(self.name), (channels, 96, 160)
        for size in ((112, 224), (192, 256), (224, 224)):
            try:
                yield timm.create_model(self.name, img_size=size), (channels, *size)
            except (AssertionError, RuntimeError, TypeError, ValueError):  # takes no size, or not this one
                continue
        yield timm.create_model(self.name), (channels, *native)

    def _of_torchvision(self) -> nn.Module:
        nothing = {"weights": None, "weights_backbone": None} if self.family != "classification" else {"weights": None}
        model = torchvision.models.get_model(self.name, **nothing)
        return model.backbone if self.family == "detection" else model


def hosts() -> list[Host]:
    """Two small models of every module of timm, the first of each first; all of torchvision's that take images."""
    pairs = []
    for module in list_modules():
        names = sorted(timm.list_models(module=module), key=lambda name: (_smallness(name), len(name)))
        theirs = [name for name in names if model_entrypoint(name).__module__.startswith("timm.")]
        pairs.append([Host("timm", module, name) for name in theirs[:2]])
    families = dict(classification=torchvision.models, detection=torchvision.models.detection)
    families |= dict(segmentation=torchvision.models.segmentation)
    others = [
        Host("torchvision", family, name)
        for family, module in families.items()
        for name in torchvision.models.list_models(module=module)
    ]
    return [pair[0] for pair in pairs if pair] + others + [host for pair in pairs for host in pair[1:]]


def _size(host: Host) -> float:
    """Parameters."""
    if host.library == "torchvision":
        return next(iter(torchvision.models.get_model_weights(host.name))).meta["num_params"]
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(host.name).parameters())


def _smallness(name: str) -> int:
    return next((rank for rank, mark in enumerate(SMALL) if re.search(mark, name)), len(SMALL))


def stage_like(model: nn.Module, size: tuple[int, int, int]) -> list[str]:
    """Of the modules at most two deep that give something of four axes (or three): the last of each shape."""
    last, hooks = {}, []
    for name, module in model.named_modules():
        if name and name.count(".") < 2:

            def keep(module, args, output, name=name):
                if isinstance(output, Tensor) and output.ndim in (3, 4):
                    last[output.shape] = name

            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(torch.zeros(1, *size))
    for hook in hooks:
        hook.remove()
    return [name for shape, name in last.items() if min(shape[1:]) > 1]


def try_host(host: Host, largest: float = 150) -> list[dict]:
    """A row for every place that was tried; ``largest``: million parameters."""

    def row(place: str, outcome: str, reason: str = "") -> dict:
        return dict(zip(("library", "family", "model", "place", "outcome", "reason"), (*host, place, outcome, reason)))

    if _size(host) > 1e6 * largest:
        return [row("", "left out", f"more than {largest:.0f} million parameters")]
    rows = [row("", "left out", "takes none of the sizes tried")]
    for model, size in host.made():
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # a head of zeros passes nothing on
                    parameter.normal_(std=0.02)
        try:
            wanted = _answer(model.eval(), size)
        except Exception:  # does not take this size
            continue
        listed = host.library == "timm" and backbones.hosts.stages(model)
        rows = [row(*r) for r in try_places(model, None if listed else stage_like(model, size), size, wanted)]
        if all(row["outcome"] not in ("wrong", "unclear") for row in rows):
            break  # else a larger image may show more of its details
    return rows


def try_places(model: nn.Module, at: list[str] | None, size: tuple, wanted: list[Tensor]) -> list[tuple]:
    """(place, outcome, reason) for every place where `insert` adds layers to ``model``, or refuses to."""
    results = _add(model, at, size)
    if results and at and not any(isinstance(module, Residual) for module in model.modules()):
        results = [result for place in at for result in _add(model, place, size)]
    layers = {module: name for name, module in model.named_modules() if isinstance(module, Residual)}
    if not layers:
        return results
    seen = {layer: [] for layer in layers}
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: seen[module].append(args))
    if not all(map(torch.equal, wanted, _answer(model, size))):
        return [*results, (", ".join(layers.values()), "wrong", "is another function at gain 0")]
    wrong = {layer: judge(layer, *calls) for layer, calls in seen.items()}
    for layer in layers:
        nn.init.constant_(layer.gain, 0.1)
    if all(map(torch.equal, wanted, _answer(model, size))):
        return [*results, (", ".join(layers.values()), "wrong", "nothing follows from the layers")]
    if any(wrong.values()):
        wrong |= {layer: "" for layer in _grow_with_the_image(model, size, seen) if len(seen[layer]) == 2}
    found = {name.rpartition(".")[0]: [] for name in layers.values()}
    for layer, name in layers.items():
        found[name.rpartition(".")[0]] += filter(None, [wrong[layer]])
    for place, some in found.items():
        lost = all("feel" in reason for reason in some)  # deep in a network that takes one size: look at it by hand
        results.append((place, ("unclear" if lost else "wrong") if some else "right", "; ".join(some)))
    return results


def _add(model: nn.Module, at: list[str] | str | None, size: tuple[int, int, int]) -> list[tuple]:
    """Inserts; (place, outcome, reason) where it can't."""
    try:
        for block in BLOCKS:
            backbones.insert(model, block, at, input_size=size)
    except ValueError as error:
        if re.match(r"(at|model|input_size)=", str(error)):
            return [(at or "all", "refused", str(error))]
        return [(at or "all", "wrong", repr(error))]
    except Exception as error:
        return [(at or "all", "wrong", repr(error))]
    return []


def _grow_with_the_image(model: nn.Module, size: tuple[int, int, int], seen: dict[Residual, list]) -> list[Residual]:
    """Layers on maps of which nothing but the height grows if the image's does: deep in a network details are lost."""
    before = {layer: calls[0][0].shape for layer, calls in seen.items() if isinstance(layer, OnMap)}
    runs = {layer: len(calls) for layer, calls in seen.items()}
    try:
        _answer(model, (size[0], 2 * size[1], size[2]))
    except Exception:  # takes one size
        return []
    after = {layer: seen[layer].pop()[0].shape for layer in before if len(seen[layer]) > runs[layer]}
    return [
        layer
        for layer, (_, channels, height, width) in after.items()
        if height > before[layer][2] and (channels, width) == (before[layer][1], before[layer][3])
    ]


def _answer(model: nn.Module, size: tuple[int, int, int]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(images(size))) if isinstance(leaf, Tensor)]


def judge(layer: Residual, *calls: tuple) -> str:
    """What is wrong with the layer's input for `images`, nothing if it lies as the images do."""
    if len(calls) != 1:
        return f"is called {len(calls)} times"
    ((x, *grid),) = calls
    if not isinstance(layer, OnMap):
        (grid,) = grid
        x = x[:, x.shape[1] - grid.size :].transpose(1, 2).unflatten(2, tuple(grid))
    change = (x[1:] - x[:1]).abs().mean(dim=1)  # (spots, H, W)
    height, width = change.shape[1:]
    change /= change.mean(dim=(1, 2), keepdim=True)
    if min(height, width) > 5:
        change = F.avg_pool2d(change, 3, 1, 1, count_include_pad=False)
    felt = [int(change[:, int(y * height), int(x * width)].argmax()) for y, x in SPOTS]  # by which change, at each spot
    return "" if felt == [*range(len(SPOTS))] else f"at {height}×{width} the spots feel the changes at {felt}"


def images(size: tuple[int, int, int]) -> Tensor:
    """Noise, and the same noise changed at each of `SPOTS`."""
    channels, height, width = size
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(1, channels, height, width, generator=generator).repeat(1 + len(SPOTS), 1, 1, 1)
    half = (max(1, height // 12), max(1, width // 12))
    for image, (y, x) in zip(batch[1:], SPOTS):
        rows = slice(int(y * height) - half[0], int(y * height) + half[0])
        columns = slice(int(x * width) - half[1], int(x * width) + half[1])
        part = image[:, rows, columns]
        part += 5 * torch.randn(part.shape, generator=generator)
    return batch


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="wildcard of models")
    parser.add_argument("--file", type=Path, help="a table, whose other rows stay")
    parser.add_argument("--largest", type=float, default=150, help="million parameters; larger models are left out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [host for host in hosts() if fnmatchcase(host.name, args.only)]
    rows = [row for row in read(args.file) if not fnmatchcase(row["model"], args.only)] if args.file else []
    for host in chosen:
        try:
            rows += try_host(host, args.largest)
        except Exception as error:
            rows.append(dict(zip(("library", "family", "model"), host), place="", outcome="failed", reason=repr(error)))
        write(args.file, "hosts", rows)
