"""Blocks in networks of the YOLO kind, through everything that ultralytics does with them.

    from ultralytics import YOLO
    from backbones.yolo import trainer

    yolo = YOLO("yolo11n.pt")
    yolo.train(data="coco8.yaml", trainer=trainer("cbam", at="model.[4-9]"))

`backbones.insert` keeps every weight of such a network, but ``YOLO.train`` builds another one from the YAML that the
network came from, and copies what has the same name: without a word the blocks are gone. This trainer inserts them into
the new network, before weights are copied. Training, validation, prediction, saved files, export and a later training
with the same trainer have them.

A saved file holds the network itself: to load it, ``vision_attn`` must be installed, and nothing else of this project.
Where it is not, there is a ModuleNotFoundError of that name, unless ultralytics installs what PyPI has
under it: it tries to, if ``YOLO_AUTOINSTALL`` is not set to false.

ultralytics is licensed under AGPL-3.0. It is no dependency, and imported only where `trainer` is called.
"""

from collections.abc import Iterable

from torch import nn

from .insert import insert


def trainer(block: str | type, at: str | Iterable[str], *, base: type | None = None, **options) -> type:
    """A class of trainers whose networks have ``block`` behind the modules ``at``, for ``YOLO.train(trainer=…)``.

    On several GPUs ultralytics imports the trainer by the name of its class, so give it one at the top of a module:
    ``class WithCbam(trainer("cbam", at="model.[4-9]")): pass``.

    Args:
        block, at: as for `backbones.insert`. Rows are called "model.0", "model.1", …; the head gives no map, so
            "model.*" is all rows but it. "model.10.m.0.attn" is the attention that YOLO11 has.
        base: the trainer of another task, for example SegmentationTrainer; None: DetectionTrainer.
        options: of `backbones.insert` and of the block.

    Raises:
        ModuleNotFoundError: ultralytics is not installed. What `backbones.insert` raises, raises ``YOLO.train``.
    """
    if base is None:
        from ultralytics.models.yolo.detect import DetectionTrainer as base
    at = at if isinstance(at, str) else list(at)

    class Trainer(base):
        def get_model(self, cfg=None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
            """The network of ``cfg`` with blocks, and what ``weights`` has of the same names."""
            model = insert(super().get_model(cfg, None, verbose), block, at, **options)
            if weights is not None:
                model.load(weights)
            return model

    return Trainer
