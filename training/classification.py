"""Classification as a task: datasets by name, augmentation, cross-entropy, top-1 and top-5 accuracy."""

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_data_config
from timm.utils import accuracy
from torch import Tensor, nn

from training.config import Config
from training.datasets import create_datasets
from training.distributed import Processes
from training.published import class_names, published_cfg
from training.shards import Shards
from training.task import Task
from training.trained import check_classifier
from training.transforms import eval_transform, train_transform


class Classification(Task):
    """Images of classes; the best checkpoint has the highest top-1 accuracy."""

    best_of, sign = "top1", 1

    def __init__(self, config: Config, processes: Processes, saved: dict | None = None):
        self.config, self.saved, self.notes = config, saved, []
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        args, known = config.model.args, None
        if saved:
            check_classifier(config.eval, saved)
            args, known = evaluated_model_args(saved, args), saved["data"]["class_names"]
        published = published_cfg(config.model.name, args) if config.eval and not saved else None
        if published:
            known = class_names(published)
        self.in_chans = args.get("in_chans", 3)

        def create():
            source = config.data, self.in_chans, config.seed, processes.size
            return create_datasets(*source, known, self.notes.append, alone=bool(config.eval))

        self.train_set, self.val_set, self.classes = processes.main_first(create) if config.data.download else create()
        self.num_classes = len(self.classes)
        if published and published["num_classes"] != self.num_classes:
            has = f"{config.data.name} has {self.num_classes}"
            raise ValueError(f"eval: {config.model.name} was published for {published['num_classes']} classes, {has}")
        self.model_args = args if saved else complete_model_args(config, self.num_classes, self.in_chans)
        self.weights = (
            class_weights(self.train_set, self.num_classes) if config.data.balance and not config.eval else None
        )
        augment = config.augment
        self.mixup = None
        if augment.mixup or augment.cutmix:
            pairs = 2 * config.optim.accumulate * processes.size
            if config.batch_size % pairs:
                each = f"2 × {config.optim.accumulate} passes × {processes.size} processes, as mixup pairs images"
                raise ValueError(f"batch_size must be a multiple of {pairs} ({each}), got {config.batch_size}")
            smoothing = dict(label_smoothing=augment.label_smoothing, num_classes=self.num_classes)
            self.mixup = Mixup(augment.mixup, augment.cutmix, **smoothing)

    def data(self, model: nn.Module) -> dict:
        """mean, std, input_size, interpolation, crop_pct, of the configuration, else of the checkpoint to evaluate,
        else of the model; class_names."""
        config, in_chans = self.config, self.in_chans
        known = self.saved["data"] if self.saved else resolve_data_config(model=model)
        size = config.data.img_size or config.model.args.get("img_size") or known["input_size"][1:]
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        resolved = dict(
            input_size=[in_chans, height, width],
            interpolation=known["interpolation"],
            crop_pct=config.data.crop_pct or known["crop_pct"],
            class_names=self.classes,
        )
        for key in ("mean", "std"):
            values = list(getattr(config.data, key) or known[key])
            if in_chans == 1 and len(values) == 3 and getattr(config.data, key) is None:
                values = [sum(values) / 3]
            if len(values) != in_chans:
                raise ValueError(f"data.{key} must have {in_chans} values, one per channel, got {values}")
            resolved[key] = values
        return resolved

    def transforms(self, data: dict) -> tuple:
        size, interpolation = data["input_size"][1:], data["interpolation"]
        return (
            train_transform(self.config.augment, size, data["mean"], data["std"], interpolation),
            eval_transform(size, interpolation, data["crop_pct"]),
        )

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, with mixup, cutmix, label smoothing and weights of classes as configured."""
        smoothing = self.config.augment.label_smoothing
        if self.mixup:
            images, targets = self.mixup(images, targets)
            smoothing = 0.0  # mixup's targets are smooth already
        logits = model(images).float()
        if self.weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        weights = self.weights.to(logits.device)
        weights = weights[targets] if targets.ndim == 1 else targets @ weights
        # the mean over images, not over weights: else a step would depend on the passes and processes it is split into
        return (weights * F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")).mean()

    def measure(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy, and accuracy in percent; with fewer than five classes top5 counts all of them."""
        logits = model(images).float()
        top1, top5 = accuracy(logits, targets, topk=(1, 5))
        return {"loss": F.cross_entropy(logits, targets), "top1": top1, "top5": top5}

    def columns(self, train_loss: float, metrics: dict[str, float]) -> dict[str, float]:
        return {"train_loss": train_loss, **{name: metrics[name] for name in ("loss", "top1", "top5")}}

    def title(self, data: dict) -> str:
        return f"{self.num_classes} classes"

    def told(self, row: dict) -> str:
        return (
            f"train loss {row['train_loss']:.3f}  loss {row['loss']:.3f}  "
            f"top-1 {row['top1']:.2f}  top-5 {row['top5']:.2f}"
        )

    def missed(self, best: float) -> str | None:
        target = self.config.target_top1
        if target is None or best >= target:
            return None
        return f"top-1 accuracy {best:.2f} % is below the target {target:.2f} %"

    def draw(self, run):
        """Nothing: report.py draws a finished run."""


def class_weights(dataset, num_classes: int) -> Tensor:
    """Of each class (num_classes,): how many images the dataset has, over those of the class times the classes."""
    if isinstance(dataset, Shards):
        raise ValueError("data.balance must be false for shards, whose labels are not known before they are read")
    counts = torch.bincount(torch.tensor(dataset.targets), minlength=num_classes)
    return counts.sum() / (num_classes * counts.clamp(min=1))


def complete_model_args(config: Config, num_classes: int, in_chans: int) -> dict:
    """The arguments of timm.create_model: those of the configuration, and what follows from the data."""
    args = {"num_classes": num_classes, "in_chans": in_chans} | config.model.args
    if args["num_classes"] != num_classes:
        given, data = args["num_classes"], config.data.name
        raise ValueError(f"model.args.num_classes is {given}, but {data} has {num_classes} classes")
    published = timm.get_pretrained_cfg(config.model.name)
    if config.data.img_size and published and published.fixed_input_size:
        args.setdefault("img_size", config.data.img_size)
    return args


def evaluated_model_args(saved: dict, given: dict) -> dict:
    """The arguments of a checkpoint's model and those given, but its own img_size, which its weights are of."""
    return saved["model_args"] | {key: value for key, value in given.items() if key != "img_size"}
