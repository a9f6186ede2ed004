"""Export a model to ONNX and check it in onnxruntime at sizes other than the traced one.

    python export_onnx.py --checkpoint runs/digits/best.pt --path runs/digits/model.onnx
    python export_onnx.py --model resnet50_cbam --pretrained true --path resnet50_cbam.onnx --image_size 224
    python export_onnx.py --model vit_small_patch16_224_criss_cross --model_args '{dynamic_img_size: true}' \
        --path vit.onnx

Of a checkpoint nothing but its path is needed: it names what was inserted and what is to be imported.
Exit code 0: every answer agreed; 1: one did not, and no file is left; 2: bad input, with one line that says what.
"""

import sys
from typing import Any

import timm

import backbones
from training import command
from training.checkpoint import load
from training.setup import import_modules, restore_model
from training.trained import check_classifier


def export(
    path: str,
    checkpoint: str | None = None,
    model: str | None = None,
    model_args: dict[str, Any] | None = None,
    imports: list[str] | None = None,
    pretrained: bool = False,
    image_size: int | tuple[int, int] | None = None,
    dynamic: bool = True,
    opset: int = 20,
    fp16: bool = False,
    int8: bool = False,
) -> None:
    """Exports a trained checkpoint or a named model.

    Args:
        path: the ONNX file to write.
        checkpoint: a checkpoint of train_imagenet.py; its moving average is exported if it has one.
        model: instead, a name that timm.create_model knows.
        model_args: further arguments of timm.create_model.
        imports: modules of your own to import first, by name; a checkpoint names its own.
        pretrained: with model: start from its published weights.
        image_size: pixels to trace at, one number or height and width; null takes the model's.
        dynamic: whether height and width may vary, where the model allows it; batch always does.
        opset: of ONNX; 18 or later; 23 keeps attention as one node.
        fp16: store and compute in float16; images and answers stay float32.
        int8: quantise weights, and inputs of products as they come.
    """
    if fp16 and int8:
        raise ValueError("fp16 and int8 exclude each other")
    if (checkpoint is None) == (model is None):
        raise ValueError("give either checkpoint or model")
    if checkpoint is not None and pretrained:
        raise ValueError("pretrained is for model: a checkpoint has weights of its own")
    import_modules(imports or [])
    metadata = {}
    if checkpoint is not None:
        saved = load(checkpoint)
        check_classifier(checkpoint, saved)
        network = restore_model(checkpoint, saved, backbones, model_args)
        image_size = image_size or tuple(saved["data"]["input_size"][1:])
        metadata = {key: value for key, value in saved["data"].items() if key != "input_size"}
    else:
        network = timm.create_model(model, pretrained=pretrained, **(model_args or {}))
    precision = "fp16" if fp16 else "int8" if int8 else "fp32"
    errors = backbones.export_onnx(network, path, image_size, dynamic, opset, precision, metadata)
    for (batch, height, width), error in errors.items():
        print(f"{batch} images of {height}×{width}: largest difference from PyTorch {error:.1e}")
    print(f"{path}: largest difference {max(errors.values()):.1e}")


def main(argv: list[str] | None = None) -> int:
    return command.run(export, __doc__, argv, (ValueError, TypeError, OSError, RuntimeError), (backbones.ExportError,))


if __name__ == "__main__":
    sys.exit(main())
