"""What timm knows of published weights, and what it has to know of those of a checkpoint."""

import re

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset


def published_cfg(name: str, args: dict | None = None) -> dict:
    """timm's pretrained_cfg of a model of that name, {} for one it does not know.

    Args:
        args: of timm.create_model, of which pretrained_cfg_overlay counts.
    """
    known = timm.get_pretrained_cfg(name)
    return (known.to_dict() if known else {}) | ((args or {}).get("pretrained_cfg_overlay") or {})


def class_names(cfg: dict, readable: bool = False) -> list[str] | None:
    """Names of the classes of published weights: their own, or those of their ImageNet; None where timm has none.

    Args:
        readable: describe classes of ImageNet in words; their names are numbers of WordNet, as its folders have them.
    """
    if cfg.get("label_names"):
        names, words = list(cfg["label_names"]), cfg.get("label_descriptions") or {}
        return [words.get(name, name) for name in names] if readable else names
    subset = infer_imagenet_subset(cfg) if cfg.get("num_classes") else None
    if not subset:
        return None
    info = ImageNetInfo(subset)
    return info.label_descriptions() if readable else info.label_names()


def readable(names: list[str]) -> list[str]:
    """Classes in words where all are numbers of WordNet, such as n01440764: tench; else as they are."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    info = ImageNetInfo("imagenet-22k")
    known = {*info.label_names()}
    return [info.label_name_to_description(name).split(",")[0] if name in known else name for name in names]


def timm_config(contents: dict) -> dict:
    """What timm's config.json says of a model, for the checkpoint `contents`: architecture, model_args, and as
    pretrained_cfg the size and normalisation of its images and the names of its classes."""
    data, known = contents["data"], published_cfg(contents["model"])
    cfg = {key: known[key] for key in ("first_conv", "classifier", "fixed_input_size") if key in known}
    kept = ("input_size", "mean", "std", "interpolation", "crop_pct")
    cfg |= {key: data[key] for key in kept if key in data}
    if "class_names" in data:
        cfg |= {"num_classes": len(data["class_names"]), "label_names": data["class_names"]}
    return {"architecture": contents["model"], "model_args": contents["model_args"], "pretrained_cfg": cfg}
