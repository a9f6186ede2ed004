"""ONNX export, checked: the file is run at sizes other than the traced one, and a mismatch is an error."""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vision_attn import check

from .insert import _input_size

TOLERANCE = 1e-4  # of the largest difference, relative to the largest output (at least 0.01: a softmax gives little)


class ExportError(RuntimeError):
    """The exported graph does not give the model's answers."""


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    dynamic: bool = True,
    opset: int = 20,
) -> dict[tuple[int, int, int], float]:
    """Exports ``model`` in eval mode and compares onnxruntime with PyTorch.

    Batch is always dynamic; height and width are where ``dynamic`` is set and the model takes more than one size. A
    layer whose gain is zero adds nothing, so a wrong graph of it would pass: then a copy with random gains is exported
    and checked first.

    Args:
        model: takes images (B, C, H, W), gives one tensor. It is not changed; a float32 copy on the CPU is exported.
        path: of the one file to write; folders are made.
        image_size: (height, width) to trace at; None: the model's own.
        dynamic: whether height and width may vary.
        opset: 18 or later.

    Returns:
        The largest absolute difference at each (batch, height, width) tried, none of them the traced one.

    Raises:
        ExportError: a difference is above 1e-4 of the largest output (of 0.01 if that is less), or the graph does
            not run. No file is left.
        ValueError: an argument is out of range, or the model does not take images of ``image_size``.
    """
    if not isinstance(opset, int) or opset < 18:
        raise ValueError(f"opset={opset!r}: must be an integer ≥ 18")
    channels, *own_size = _input_size(model)
    size = check.pair("image_size", own_size if image_size is None else image_size)
    path, model = Path(path), copy.deepcopy(model).cpu().float().eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, channels, *size))
    except (AssertionError, RuntimeError, ValueError) as error:  # timm asserts sizes
        raise ValueError(f"image_size={size}: the model does not take images of this size: {error}") from error
    sizes = _sizes(model, size, dynamic)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        awake = _awake(model)
        if awake is not None:
            _write(awake, Path(folder, "awake.onnx"), channels, size, dynamic, opset)
            _compare(awake, Path(folder, "awake.onnx"), channels, sizes)
        _write(model, Path(folder, "model.onnx"), channels, size, dynamic, opset)
        errors = _compare(model, Path(folder, "model.onnx"), channels, sizes)
        Path(folder, "model.onnx").replace(path)
    return errors


def _awake(model: nn.Module) -> nn.Module | None:
    """A copy whose all-zero parameters are random, so that no part is multiplied away; None if there are none."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    asleep = [p for p in model.parameters() if p.numel() and not p.detach().any()]
    with torch.no_grad():
        for parameter in asleep:
            draw = torch.empty(parameter.shape).uniform_(-0.5, 0.5, generator=generator)
            parameter.copy_(draw + 0.25 * draw.sign())  # none so small that it hides a part
    return model if asleep else None


def _varies(model: nn.Module, dynamic: bool) -> bool:
    embed = getattr(model, "patch_embed", None)
    return dynamic and not getattr(embed, "strict_img_size", False)


def _sizes(model: nn.Module, size: tuple[int, int], dynamic: bool) -> list[tuple[int, int, int]]:
    """Six (batch, height, width) to try, neither square nor round where the model allows."""
    if not _varies(model, dynamic):
        return [(batch, *size) for batch in (1, 3, 4, 5, 7, 8)]
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        shifts = ((1, 3, 0), (3, -5, 7), (1, 11, -13), (2, -7, -9), (5, 17, 2), (1, 32, 64))
        return [(b, max(1, size[0] + y), max(1, size[1] + x)) for b, y, x in shifts]
    grid = [n // p for n, p in zip(size, patch)]
    shifts = ((1, 1, 0), (3, -1, 2), (1, 3, -2), (2, -2, -3), (5, 2, 1), (1, 4, 6))
    return [(b, *(max(1, n + d) * p for n, d, p in zip(grid, (y, x), patch))) for b, y, x in shifts]


def _write(model: nn.Module, path: Path, channels: int, size: tuple[int, int], dynamic: bool, opset: int) -> None:
    axes = {0: torch.export.Dim.DYNAMIC}
    if _varies(model, dynamic):
        axes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        model,
        (torch.zeros(2, channels, *size),),
        path,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=(axes,),
        input_names=["image"],
        output_names=["output"],
        external_data=False,
        verbose=False,
    )


def _compare(model: nn.Module, path: Path, channels: int, sizes: list) -> dict[tuple[int, int, int], float]:
    import onnxruntime  # of the extra "onnx"

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator, errors = torch.Generator().manual_seed(1), {}
    for batch, height, width in sizes:
        images = torch.randn(batch, channels, height, width, generator=generator)
        with torch.no_grad():
            wanted: Tensor = model(images)
        try:
            got = session.run(None, {"image": images.numpy()})[0]
        except Exception as error:  # onnxruntime's own errors have no common class
            raise ExportError(
                f"at (batch, height, width) = {(batch, height, width)} onnxruntime can't run the graph: {error}"
            ) from error
        error = float(np.abs(got - wanted.numpy()).max())
        errors[batch, height, width] = error
        if got.shape != tuple(wanted.shape) or not error <= TOLERANCE * max(0.01, float(wanted.abs().max())):
            raise ExportError(
                f"at (batch, height, width) = {(batch, height, width)} onnxruntime differs from PyTorch by {error:.2g}"
            )
    return errors
