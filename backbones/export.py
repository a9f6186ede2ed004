"""ONNX export, checked: the file is run at sizes other than the traced one, and a mismatch is an error."""

import copy
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_flatten_with_path

from vision_attn import Gate, Mixer, __version__, check, list_blocks
from vision_attn.zoo import name_of

from .hosts import input_size_of, takes

# Of the largest difference, relative to the largest output (at least 0.01: a softmax gives little). Of int8 only that
# it runs is certain: how much it may differ is a matter of the accuracy it keeps.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.5}


class ExportError(RuntimeError):
    """The exported graph does not give the model's answers."""


class Differs(ExportError):
    """It gives others, of the right shape."""


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    dynamic: bool = True,
    opset: int = 20,
    precision: str = "fp32",
    metadata: dict | None = None,
) -> dict[tuple[int, int, int], float]:
    """Exports ``model`` in eval mode and compares onnxruntime with PyTorch.

    The input is called "image", its axes batch, channels, height and width: batch always varies, height and width do
    where ``dynamic`` is set and the model takes more than one size. One tensor is called "output", those of a dict by
    their keys (one of the key "image" output_image), those of a list or tuple output_0, output_1, …

    A layer whose gain is zero adds nothing, so a wrong graph of it would pass: a copy with random gains and norms is
    exported and checked first. What chooses by content (a block with `choose`) may choose otherwise where two choices
    are nearly as good, and be right: there a size fails that differs for each of three batches, as a wrong graph does.
    The file names what is needed to use it: see `describe_export`.

    Args:
        model: takes images (B, C, H, W), gives a tensor, or a dict, list or tuple of them, as many for any images. It
            is not changed; a float32 copy on the CPU is exported.
        path: of the one file to write; folders are made.
        image_size: (height, width) to trace at, or at four times as much where that fails; None: the model's own.
        dynamic: whether height and width may vary.
        opset: 18 or later, as far as torch and onnxruntime know it.
        precision: fp32; fp16, with float32 images and answers; int8, the weights of products quantised, and their
            inputs as they come.
        metadata: more of it, plain types by name.

    Returns:
        The largest absolute difference of any output at each (batch, height, width) tried, none of them the traced one.

    Raises:
        ExportError: a difference is above 1e-4 (fp16: 0.02, int8: 0.5) of the output's largest number (of 0.01 if that
            is less), or torch can't export the model, or the graph does not run. No file is left.
        ValueError: an argument is out of range; the model does not take images of ``image_size``, is pruned, or gives
            something else than tensors.
    """
    if not isinstance(opset, int) or opset < 18:
        raise ValueError(f"opset={opset!r}: must be an integer ≥ 18")
    check.one_of("precision", precision, tuple(TOLERANCES))
    channels, *own_size = input_size_of(model)
    size = check.pair("image_size", own_size if image_size is None else image_size)
    path, model = Path(path), _copy(model).cpu().float().eval()
    try:
        with torch.no_grad():
            outputs = [model(torch.zeros(batch, channels, *size)) for batch in (1, 2)]
    except (AssertionError, RuntimeError, ValueError) as error:  # timm asserts sizes
        raise ValueError(f"image_size={size}: the model does not take images of this size: {error}") from error
    one, two = map(_by_name, outputs)
    if one.keys() != two.keys():
        raise ValueError(
            f"model={type(model).__name__}: gives {len(one)} tensors for one image and {len(two)} for two, as "
            "detectors do; a part that gives as many for any images can be exported (its backbone)"
        )
    sizes = _sizes(model, channels, size, dynamic)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        awake, file = _awake(model, channels, size), Path(folder, "model.onnx")
        models = [model] if awake is None else [awake, model]
        try:
            errors = _write_and_compare(models, file, channels, size, sizes, dynamic, opset)
        except ExportError:
            if not _varies(model, dynamic):
                raise
            larger = 4 * size[0], 4 * size[1]  # what is one tile at the traced size is one for ever to some graphs
            try:
                errors = _write_and_compare(models, file, channels, larger, sizes, dynamic, opset)
            except ExportError as error:
                raise ExportError(f"{error}; dynamic=False exports for one size") from error
        if precision != "fp32":
            _convert(file, precision)
            errors = _compare(model, file, channels, sizes, precision)
        _describe(file, describe_export(model, size) | {"precision": precision} | (metadata or {}))
        file.replace(path)
    return errors


def _copy(model: nn.Module) -> nn.Module:
    if prune.is_pruned(model):
        raise ValueError(
            f"model={type(model).__name__}: is pruned, its weights are products with masks; make them weights first: "
            "torch.nn.utils.prune.remove(module, name)"
        )
    return copy.deepcopy(model)


def _by_name(output) -> dict[str, Tensor]:
    """The tensors that a model gave, in the order of torch's exporter."""
    named = {}
    for path, tensor in tree_flatten_with_path(output)[0]:
        keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
        if not keys or keys == ["image"] or not keys[0].isidentifier():  # "image" is the input
            keys = ["output", *keys]
        name = "_".join(keys)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"model: gives {type(tensor).__name__} as {name}, must give nothing but tensors")
        if name in named:
            raise ValueError(f"model: gives two tensors that would both be called {name}")
        named[name] = tensor
    return named


def describe_export(model: nn.Module, image_size: tuple[int, int]) -> dict:
    """What a file says of itself: model, blocks, image_size, mean, std, interpolation, crop_pct, num_classes and the
    version of vision_attn."""
    config = getattr(model, "pretrained_cfg", None) or {}
    blocks = {name_of(type(m)) for m in model.modules() if isinstance(m, (Gate, Mixer))}
    known = {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct") if key in config}
    return {
        "model": config.get("architecture") or type(model).__name__,
        "blocks": sorted(blocks & set(list_blocks())),  # without what blocks are made of
        "image_size": list(image_size),
        **known,
        "num_classes": getattr(model, "num_classes", None),
        "vision_attn": __version__,
    }


def _describe(path: Path, metadata: dict) -> None:
    """Write metadata into the file, each value as JSON."""
    import onnx  # of the extra "onnx"

    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.save(graph, path)


def _convert(path: Path, precision: str) -> None:
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    graph = onnx.load(path)
    if precision == "fp16":
        graph = convert_float_to_float16(graph, keep_io_types=True)
        _cast_once(graph.graph)
        onnx.save(graph, path)
    else:
        _own_weights(graph.graph)
        unknown = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # without shapes it can't infer all types
        quantize_dynamic(graph, path, extra_options=unknown)


def _cast_once(graph) -> None:
    """Leave out what makes a value a second time: the converter casts to float32 anew for each node that needs it."""
    makers = {tuple(node.output): node for node in graph.node}
    del graph.node[:]
    graph.node.extend(makers.values())


def _own_weights(graph) -> None:
    """Give each node copies of weights it shares with another: the quantiser turns a shared one once for each."""
    weights, seen = {weight.name: weight for weight in graph.initializer}, set()
    for number, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            if name in weights and name in seen:
                copied = copy.deepcopy(weights[name])
                copied.name = node.input[place] = f"{name}_{number}"
                graph.initializer.append(copied)
            seen.add(name)


@torch.no_grad()
def _awake(model: nn.Module, channels: int, size: tuple[int, int]) -> nn.Module | None:
    """A copy in which no part is multiplied away; None where ``model`` has no such part.

    Where features are multiplied by each other answers may run away: then less of it is drawn.
    """
    images = 4 * torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(2))
    most = 100 * max(1.0, _largest(model, images))
    for share in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16):
        awake = _drawn(model, share)
        if awake is None or _largest(awake, images) <= most:
            break
    return awake


def _largest(model: nn.Module, images: Tensor) -> float:
    return max(float(tensor.abs().max()) for tensor in _by_name(model(images)).values())


def _drawn(model: nn.Module, share: float) -> nn.Module | None:
    """A copy whose all-zero and all-one parameters and statistics are random, as are other gains that are all alike;
    None if there are none. A ``share`` of 1 draws from ±(¼ to ¾) for 0, from ½ to 1½ for 1."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.numel() and t.is_floating_point()]
    asleep = [t for t in tensors if t.min() == t.max() and (t.min() in (0, 1) or t.numel() > 1)]
    for tensor in asleep:
        alike, draw = tensor.flatten()[0], torch.empty(tensor.shape).uniform_(-0.5, 0.5, generator=generator)
        if alike == 0:
            tensor.copy_(share * (draw + 0.25 * draw.sign()))  # no zero left
        else:
            tensor.copy_(alike.sign() * alike.abs().clamp(min=1) * (1 + share * draw))  # no variance below 0.5
    return model if asleep else None


def _varies(model: nn.Module, dynamic: bool) -> bool:
    embed = getattr(model, "patch_embed", None)
    return dynamic and not getattr(embed, "strict_img_size", False)


def _sizes(model: nn.Module, channels: int, size: tuple[int, int], dynamic: bool) -> list[tuple[int, int, int]]:
    """Six (batch, height, width) to try, neither square nor round where the model allows."""
    if not _varies(model, dynamic):
        return [(batch, *size) for batch in (1, 3, 4, 5, 7, 8)]
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        shifts = ((1, 3, 0), (3, -5, 7), (1, 11, -13), (2, -7, -9), (5, 17, 2), (1, 32, 64))
        sizes = [(b, max(1, size[0] + y), max(1, size[1] + x)) for b, y, x in shifts]
        if takes(model, (channels, *sizes[0][1:])):
            return sizes
        patch = (32, 32)  # folds its images, as TResNet
    grid = [n // p for n, p in zip(size, patch)]
    shifts = ((1, 1, 0), (3, -1, 2), (1, 3, -2), (2, -2, -3), (5, 2, 1), (1, 4, 6))
    return [(b, *(max(1, n + d) * p for n, d, p in zip(grid, (y, x), patch))) for b, y, x in shifts]


def _write_and_compare(models, path, channels, size, sizes, dynamic, opset) -> dict[tuple[int, int, int], float]:
    """Of the last model, which stays in the file; the others must pass too."""
    for model in models:
        _write(model, path, channels, size, dynamic, opset)
        errors = _compare(model, path, channels, sizes, "fp32")
    return errors


def _write(model: nn.Module, path: Path, channels: int, size: tuple[int, int], dynamic: bool, opset: int) -> None:
    import onnx  # of the extra "onnx"
    from torch._dynamo import config  # takes a second

    axes, images = {0: "batch"}, torch.zeros(2, channels, *size)
    if _varies(model, dynamic):
        axes |= {2: "height", 3: "width"}
    with torch.no_grad():
        names = list(_by_name(model(images)))
    try:
        with config.patch(fake_tensor_cache_enabled=False):  # it costs more than it saves where sizes are free
            torch.onnx.export(
                model,
                (images,),
                path,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=(axes,),
                input_names=["image"],
                output_names=[f"output {name}" for name in names],  # as no value inside is called
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"torch {torch.__version__} can't export {type(model).__name__}: {cause}") from error
    graph = onnx.load(path)
    (written,) = (entry.version for entry in graph.opset_import if entry.domain == "")
    if written != opset:
        raise ValueError(f"opset={opset}: torch {torch.__version__} knows no such opset, it wrote {written}")
    del graph.graph.value_info[:]  # shapes of a traced batch, which onnxruntime and the converters would believe
    _name_outputs(graph.graph, names)
    onnx.save(graph, path)


def _name_outputs(graph, names: list[str]) -> None:
    """Name the outputs "output NAME" as they should be; what is called so inside gets another name."""
    graphs = list(_graphs(graph))
    nodes = [node for some in graphs for node in some.node]
    inside = {name for node in nodes for name in (*node.input, *node.output)}
    new = {f"output {name}": name for name in names}
    for name in inside.intersection(names):
        new[name] = next(other for n in itertools.count() if (other := f"{name}_{n}") not in inside.union(names))
    for value in (value for some in graphs for value in (*some.output, *some.initializer)):
        value.name = new.get(value.name, value.name)
    for side in (side for node in nodes for side in (node.input, node.output)):
        side[:] = [new.get(name, name) for name in side]


def _graphs(graph):
    """A graph, and those of its branches and loops, which know its values by name."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _graphs(inner)


def _compare(
    model: nn.Module, path: Path, channels: int, sizes: list, precision: str
) -> dict[tuple[int, int, int], float]:
    import onnxruntime  # of the extra "onnx"

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors have no common class
        raise ExportError(f"onnxruntime {onnxruntime.__version__} can't load the graph: {error}") from error
    tries = 3 if any(hasattr(module, "choose") for module in model.modules()) else 1
    generator, errors = torch.Generator().manual_seed(1), {}
    for size in sizes:
        for left in reversed(range(tries)):
            try:
                errors[size] = _error(model, session, channels, size, precision, generator)
                break
            except Differs:
                if not left:
                    raise
    return errors


def _error(model, session, channels: int, size: tuple[int, int, int], precision: str, generator) -> float:
    """The largest difference of any output, for images drawn anew."""
    batch, height, width = size
    where = f"at (batch, height, width) = {size}"
    images = torch.randn(batch, channels, height, width, generator=generator)
    try:
        with torch.no_grad():
            wanted = _by_name(model(images))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"image_size: the model does not take {height}×{width}, which is tried beside it; give a larger one, "
            f"or dynamic=False: {error}"
        ) from error
    try:
        got = session.run(list(wanted), {"image": images.numpy()})
    except Exception as error:
        raise ExportError(f"{where} onnxruntime can't run the graph: {error}") from error
    largest = 0.0
    for (name, right), answer in zip(wanted.items(), got, strict=True):
        if answer.shape != tuple(right.shape):
            raise ExportError(f"{where} onnxruntime gives {answer.shape} as {name}, PyTorch {tuple(right.shape)}")
        error = float(np.abs(answer - right.numpy()).max())
        largest = max(error, largest)
        if not error <= TOLERANCES[precision] * max(0.01, float(right.abs().max())):
            raise Differs(f"{where} onnxruntime differs from PyTorch by {error:.2g} in {name}")
    return largest
