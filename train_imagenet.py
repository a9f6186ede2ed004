"""Train any timm model to classify images, or evaluate a checkpoint.

    python train_imagenet.py --config configs/digits_cifar_resnet20_cbam.yaml
    python train_imagenet.py --config configs/digits_cifar_resnet20_cbam.yaml --optim.lr 0.05 --output runs/slower
    python train_imagenet.py --config configs/digits_cifar_resnet20_cbam.yaml --resume runs/digits/last.pt
    python train_imagenet.py --config configs/digits_cifar_resnet20_cbam.yaml --eval runs/digits/best.pt

Writes log.csv, last.pt and best.pt to the output folder. Exit code 0: done; 1: the loss was not finite, or top-1
accuracy stayed below target_top1; 2: bad input, with one line that says what.
"""

import dataclasses
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_data_config
from torch.utils.data import IterableDataset

import backbones  # noqa: F401  registers the named models
from training import checkpoint
from training.config import Config, parse
from training.datasets import create_datasets
from training.engine import current_lr, evaluate, train_one_epoch
from training.loader import Batches, Samples, StreamSamples
from training.log import CsvLog
from training.seeding import seed_all
from training.setup import create_model, create_state, find_device
from training.transforms import eval_transform, train_transform


def main(argv: list[str] | None = None) -> int:
    config = parse(__doc__.splitlines()[0], argv)
    try:
        run = Evaluation(config) if config.eval else Training(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        top1 = run()
    except FloatingPointError as error:
        print(f"error: {error}; the checkpoints in {config.output} are of the epochs before", file=sys.stderr)
        return 1
    if config.target_top1 is not None and top1 < config.target_top1:
        print(f"error: top-1 accuracy {top1:.2f} % is below the target {config.target_top1:.2f} %", file=sys.stderr)
        return 1
    return 0


class Run:
    """What training and evaluation share. Constructors raise ValueError or FileNotFoundError for all bad input."""

    def __init__(self, config: Config, in_chans: int):
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.in_chans = in_chans
        self.device = find_device(config.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.micro_batch = config.batch_size // config.optim.accumulate
        self.train_set, self.val_set, self.class_names = create_datasets(
            config.data, in_chans, self.micro_batch, config.seed
        )

    def create_batches(self, dataset, transform, data: dict, **kwargs) -> Batches:
        seed = self.config.seed
        if isinstance(dataset, IterableDataset):
            samples = StreamSamples(dataset, transform, seed)
        else:
            samples = Samples(dataset, transform, self.in_chans, seed)
        return Batches(
            samples,
            self.micro_batch,
            data["mean"],
            data["std"],
            seed=seed,
            workers=self.config.data.workers,
            device=self.device,
            memory_format=self.memory_format,
            **kwargs,
        )

    def create_val_batches(self, data: dict) -> Batches:
        transform = eval_transform(data["input_size"][1:], data["interpolation"], data["crop_pct"])
        return self.create_batches(self.val_set, transform, data)


class Evaluation(Run):
    """A checkpoint and the images to evaluate it on; called, prints its accuracy and returns top-1 in percent."""

    def __init__(self, config: Config):
        saved = checkpoint.load(config.eval)
        super().__init__(config, saved["model_args"]["in_chans"])
        known = saved["data"]["class_names"]
        if known != self.class_names:
            raise ValueError(f"{config.eval} knows the classes {known}, the data have {self.class_names}")
        self.model = create_model(saved["model"], saved["model_args"])
        self.model.load_state_dict(saved["ema"] or saved["state_dict"])
        self.model.to(self.device, memory_format=self.memory_format)
        self.batches = self.create_val_batches(saved["data"])
        if config.compile:
            self.model.compile()

    def __call__(self) -> float:
        metrics = evaluate(self.model, self.batches, self.autocast)
        print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)
        return metrics["top1"]


class Training(Run):
    """A model, its images, and where its training stands; called, trains and returns the best top-1 in percent."""

    def __init__(self, config: Config):
        super().__init__(config, config.model.args.get("in_chans", 3))
        self.output = Path(config.output)
        if not (config.resume or config.overwrite) and any(map(Path.exists, self.files("log.csv", "last.pt"))):
            raise ValueError(
                f"output {self.output} holds a run already: go on with --resume {self.output}/last.pt, "
                "or give another --output, or --overwrite true"
            )

        saved = checkpoint.load(config.resume) if config.resume else None
        name, args = config.model.name, complete_model_args(config, len(self.class_names), self.in_chans)
        if saved and (saved["model"], saved["model_args"]) != (name, args):
            raise ValueError(f"{config.resume} holds {saved['model']} {saved['model_args']}, not {name} {args}")
        seed_all("model", config.seed)
        model = create_model(name, args, pretrained=config.model.pretrained and not saved)
        model.to(self.device, memory_format=self.memory_format)

        data = resolve_data(config, model, self.in_chans) | {"class_names": self.class_names}
        transform = train_transform(
            config.augment, data["input_size"][1:], data["mean"], data["std"], data["interpolation"]
        )
        self.train_batches = self.create_batches(
            self.train_set, transform, data, shuffle=True, multiple=config.optim.accumulate
        )
        self.val_batches = self.create_val_batches(data)

        self.loss_fn = create_loss(config, model, len(self.class_names))
        self.state = create_state(
            config.optim, model, config.epochs, self.train_batches.num_batches // config.optim.accumulate
        )
        self.epoch, self.best = 0, float("-inf")
        if saved:
            self.restore(saved)
        if config.compile:
            model.compile()
            if self.state.ema:
                self.state.ema.module.compile()
        self.record = dict(
            model=name, model_args=args, data=data, config=dataclasses.asdict(config), versions=checkpoint.versions()
        )

    def files(self, *names: str) -> list[Path]:
        return [self.output / name for name in names]

    def restore(self, saved: dict):
        """Go on from the checkpoint `saved`."""
        state = self.state
        if (state.ema is None) != (saved["ema"] is None):
            raise ValueError(
                f"optim.ema is {self.config.optim.ema}, but {self.config.resume} "
                f"has {'no' if saved['ema'] is None else 'a'} moving average"
            )
        state.model.load_state_dict(saved["state_dict"])
        state.optimizer.load_state_dict(saved["optimizer"])
        if state.ema:
            state.ema.module.load_state_dict(saved["ema"])
        self.epoch, state.step, self.best = saved["epoch"], saved["step"], saved["metrics"]["best_top1"]
        state.scheduler.step_update(state.step)

    def __call__(self) -> float:
        config, state = self.config, self.state
        self.output.mkdir(parents=True, exist_ok=True)
        log = CsvLog(self.output / "log.csv", epochs=self.epoch)
        print(self.describe(), flush=True)
        while self.epoch < config.epochs:
            start, lr = time.perf_counter(), current_lr(state)
            train_loss = train_one_epoch(
                state,
                self.train_batches,
                self.loss_fn,
                self.epoch,
                config.seed,
                config.optim.accumulate,
                config.optim.clip_grad,
                self.autocast,
            )
            speed = self.train_batches.num_images / (time.perf_counter() - start)
            metrics = evaluate(state.evaluated, self.val_batches, self.autocast)

            self.epoch += 1
            better = metrics["top1"] > self.best
            self.best = max(self.best, metrics["top1"])
            for path in self.files("last.pt", "best.pt") if better else self.files("last.pt"):
                checkpoint.save(
                    path,
                    **self.record,
                    state_dict=state.model.state_dict(),
                    ema=state.ema.module.state_dict() if state.ema else None,
                    optimizer=state.optimizer.state_dict(),
                    epoch=self.epoch,
                    step=state.step,
                    metrics=metrics | {"best_top1": self.best},
                )
            seconds = time.perf_counter() - start
            log.write(
                epoch=self.epoch,
                step=state.step,
                lr=lr,
                train_loss=train_loss,
                **metrics,
                images_per_second=speed,
                seconds=seconds,
            )
            print(
                f"epoch {self.epoch}/{config.epochs}  lr {lr:.3g}  train loss {train_loss:.3f}  "
                f"loss {metrics['loss']:.3f}  top-1 {metrics['top1']:.2f}  top-5 {metrics['top5']:.2f}  "
                f"{speed:.0f} images/s  {seconds:.0f} s",
                flush=True,
            )
        print(f"best top-1 {self.best:.2f} %, in {self.output}/best.pt", flush=True)
        return self.best

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.state.model.parameters()) / 1e6
        size = "×".join(map(str, self.record["data"]["input_size"]))
        return (
            f"{self.config.model.name}: {parameters:.2f} M parameters, input {size}, {len(self.class_names)} classes; "
            f"{self.config.data.name}: {self.train_batches.num_images} images an epoch, "
            f"{self.val_batches.num_images or '?'} to evaluate; {self.device}, {torch.get_num_threads()} threads, "
            f"{'bf16' if self.config.bf16 else 'fp32'}, torch {torch.__version__}"
        )


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


def resolve_data(config: Config, model: torch.nn.Module, in_chans: int) -> dict:
    """mean, std, input_size, interpolation and crop_pct: those of the configuration, else of the model; plain types."""
    known = resolve_data_config(model=model)
    size = config.data.img_size or config.model.args.get("img_size") or known["input_size"][1:]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    resolved = dict(
        input_size=[in_chans, height, width],
        interpolation=known["interpolation"],
        crop_pct=config.data.crop_pct or known["crop_pct"],
    )
    for key in ("mean", "std"):
        values = list(getattr(config.data, key) or known[key])
        if in_chans == 1 and len(values) == 3 and getattr(config.data, key) is None:
            values = [sum(values) / 3]
        if len(values) != in_chans:
            raise ValueError(f"data.{key} must have {in_chans} values, one per channel, got {values}")
        resolved[key] = values
    return resolved


def create_loss(config: Config, model: torch.nn.Module, num_classes: int):
    """The loss of a batch (images, targets): cross-entropy, with mixup, cutmix and label smoothing as configured."""
    augment = config.augment
    if augment.mixup or augment.cutmix:
        mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=num_classes)

        def loss_fn(images, targets):
            images, targets = mixup(images, targets)
            return F.cross_entropy(model(images).float(), targets)
    else:

        def loss_fn(images, targets):
            return F.cross_entropy(model(images).float(), targets, label_smoothing=augment.label_smoothing)

    return loss_fn


if __name__ == "__main__":
    sys.exit(main())
