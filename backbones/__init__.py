"""Attention in timm backbones. Importing this package registers the named models with timm."""

from . import cifar_resnet, attn_resnet, attn_vit  # isort: skip: the stock models come first
from .added import new_parameters
from .any_size import any_size
from .authors import load_authors
from .export import ExportError, export_onnx
from .insert import insert
from .maps import attention_maps, draw_maps
from .pixel import PixelTransformer, TwoStreamPixelTransformer
from .replace import Report, replace
from .reversible_vit import ReversibleViT

__all__ = [
    "ExportError",
    "PixelTransformer",
    "Report",
    "ReversibleViT",
    "TwoStreamPixelTransformer",
    "any_size",
    "attention_maps",
    "attn_resnet",
    "attn_vit",
    "cifar_resnet",
    "draw_maps",
    "export_onnx",
    "insert",
    "load_authors",
    "new_parameters",
    "replace",
]
