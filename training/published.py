"""What timm knows of published weights: the names of their classes."""

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
