"""What a run is: nested plain dataclasses, filled from YAML files and the command line.

Values are checked when the configuration is put together; a bad one raises ValueError with its name, its value and what
is allowed. Types and unknown names are checked before that, by the parser.
"""

import os
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from training.command import Parser, spelled_out

SOURCES = {  # what says where their images are
    "digits": (),
    "pathfinder": ("dir",),
    "cifar10": ("dir", "download"),
    "cifar100": ("dir", "download"),
    "folder": ("dir", "train_split", "val_split", "val_share"),
    "csv": ("dir", "train_split", "val_split", "val_share", "input_key", "target_key"),
    "hfds": ("dir", "train_split", "val_split", "input_key", "target_key"),
    "wds": ("dir", "train_split", "val_split", "input_key", "target_key", "num_classes"),
}
FREE = {  # what decides no result
    *("output", "overwrite", "save_every", "keep", "tensorboard", "resume", "eval", "eval_first", "dry_run"),
    *("max_bad", "threads", "parallel", "device", "data.workers", "data.dir", "data.download"),
}
PRETRAINED = "pretrained"  # what eval may be instead of a path
# what a run that goes on does not take from before
ONCE = ("resume", "eval", "eval_first", "dry_run", "overwrite", "target_top1", "target_bits")


def check(name: str, value, ok: bool, allowed: str):
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def complete_source(data: "DataConfig | ImageConfig"):
    """Choose the source where none is named, and write out ~ in dir; ValueError for options that the source ignores."""
    data.name = data.name or ("digits" if data.dir is None else "folder")
    data.dir = data.dir and os.path.expanduser(data.dir)
    options = ("dir", "download", "train_split", "val_split", "val_share", "input_key", "target_key")
    uses = SOURCES.get(data.name.partition("/")[0], options)
    for option in options:
        value = getattr(data, option, None)
        hint = "; data.name folder reads images of your own" if option == "dir" else ""
        check(f"data.{option}", value, option in uses or not value, f"left out with data.name {data.name}{hint}")


@dataclass
class ModelConfig:
    """Model.

    Args:
        name: any name timm.create_model knows.
        args: further arguments of timm.create_model, such as drop_path_rate or in_chans (1 or 3).
        pretrained: start from the published weights of that name.
        insert: name of a block to add to it, as layers that change nothing until they are trained; see
            `python -m vision_attn list`.
        at: where: names of its modules, with wildcards, such as 'layer3.*'; null: after every stage, or ViT block.
        attn_args: options of that block.
    """

    name: str = "cifar_resnet20_cbam"
    args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    insert: str | None = None
    at: str | list[str] | None = None
    attn_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("at", "attn_args"):
            value = getattr(self, name)
            check(f"model.{name}", value, self.insert or not value, "left out without model.insert")

    @property
    def inserted(self) -> dict | None:
        """What is added to the model, as a checkpoint has it."""
        return {"block": self.insert, "at": self.at, "options": self.attn_args} if self.insert else None

    @property
    def title(self) -> str:
        return self.name + (f" + {self.insert}" if self.insert else "")


@dataclass
class DataConfig:
    """Images.

    Args:
        name: digits, pathfinder (or pathfinder/hard, pathfinder/64), cifar10, cifar100, folder, csv (images and labels
            in tables), hfds/NAME (Hugging Face datasets) or wds (WebDataset shards); null takes folder if dir is given,
            else digits.
        dir: where the images are: the root of cifar10, cifar100, folder, csv and wds; the cache of hfds and,
            if given, of pathfinder, whose images take milliseconds to draw.
        download: let cifar10 and cifar100 be downloaded into dir.
        train_split: a folder name, the name of a table, a split name or a shard pattern; null takes the usual names of
            the source.
        val_split: the same for validation.
        val_share: of folder and csv without a validation split: the share of each class's images that is kept for it;
            which ones follows from seed.
        balance: weigh each image's loss by the inverse of how many images its class has, so that classes count alike.
        train_images: how many of the training images to take, the first ones; null takes all; not of shards.
        input_key: name of the image column or file ending, where the source has several; of csv path, if null.
        target_key: name of the label column, where the source has several; of csv label, if null.
        num_classes: null counts them; wds can't count, and needs it where its _info.json does not name them.
        img_size: side of the square the model sees, in pixels, or height and width; null takes the model's.
        mean: of each channel, in 0..1, for normalisation; null takes the model's.
        std: likewise.
        crop_pct: share of the resized image that evaluation keeps; null takes the model's.
        workers: loader processes for training, and as many for validation; 0 loads in the main process.
    """

    name: str | None = None
    dir: str | None = None
    download: bool = False
    train_split: str | None = None
    val_split: str | None = None
    val_share: float | None = None
    balance: bool = False
    train_images: int | None = None
    input_key: str | None = None
    target_key: str | None = None
    num_classes: int | None = None
    img_size: int | list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = None
    workers: int = 0

    def __post_init__(self):
        complete_source(self)
        kind = self.name.partition("/")[0]
        check("data.name", self.name, kind in SOURCES, f"{', '.join(list(SOURCES)[:-2])}, hfds/NAME or wds")
        check("data.name", self.name, kind != "hfds" or len(self.name) > len("hfds/"), "hfds/NAME, with a name")
        check("data.train_images", self.train_images, self.train_images is None or self.train_images >= 1, "at least 1")
        check("data.num_classes", self.num_classes, self.num_classes is None or self.num_classes >= 2, "at least 2")
        sides = self.img_size if isinstance(self.img_size, list) else [self.img_size or 1] * 2
        ok = len(sides) == 2 and min(sides) >= 1 and self.img_size != 0
        check("data.img_size", self.img_size, ok, "at least 1, or a height and a width of at least 1")
        check("data.val_share", self.val_share, self.val_share is None or 0 < self.val_share < 1, "in (0, 1)")
        both = self.val_share is not None and self.val_split
        check("data.val_split", self.val_split, not both, "left out with data.val_share, which makes one")
        check("data.crop_pct", self.crop_pct, self.crop_pct is None or 0 < self.crop_pct <= 1, "in (0, 1]")
        check("data.workers", self.workers, self.workers >= 0, "0 or more")


@dataclass
class AugmentConfig:
    """Augmentation of training images.

    Args:
        crop: pad (a random crop of the image padded by an eighth of its side; for small images), resized (a random
            part, resized), or centre (none).
        min_area: smallest share of the image a resized crop takes.
        hflip: probability of a horizontal flip; leave it at 0 where left and right matter, as in digits.
        color_jitter: strength of brightness, contrast and saturation changes; no effect beside auto_augment.
        auto_augment: a timm policy such as rand-m9-mstd0.5-inc1.
        erase: probability of erasing a random rectangle.
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of cutmix; 0 is off; beside mixup each batch takes one of the two.
        label_smoothing: share of the target spread over all classes.
    """

    crop: Literal["pad", "resized", "centre"] = "pad"
    min_area: float = 0.08
    hflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self):
        for name in ("hflip", "erase"):
            check(f"augment.{name}", getattr(self, name), 0 <= getattr(self, name) <= 1, "a probability in 0..1")
        for name in ("color_jitter", "mixup", "cutmix"):
            check(f"augment.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check("augment.min_area", self.min_area, 0 < self.min_area <= 1, "in (0, 1]")
        check("augment.label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in [0, 1)")


@dataclass
class OptimConfig:
    """Optimizer and schedule: linear warm-up from lr / 100, then a cosine down to min_lr, set anew for every step.

    Args:
        name: any optimizer timm knows; sgd has Nesterov momentum, momentum is without.
        lr: the peak, for the whole batch.
        momentum: for optimizers that have one.
        weight_decay: not applied to biases, norms and other 1-D parameters, nor to what a model names in
            no_weight_decay, as class tokens, and the learned tokens and tables of blocks.
        args: further arguments of the optimizer, such as betas.
        warmup_epochs: length of the warm-up; counts as part of epochs.
        min_lr: the end of the cosine.
        accumulate: forward passes each batch is split into; changes memory, not the gradient.
        clip_grad: largest gradient norm; null does not clip.
        ema: decay of the moving average of the weights, which is then what is evaluated; null keeps none.
        only: train these parameters alone, by name, with wildcards that cross dots, such as '*attn_*'; the rest is
            frozen, its BatchNorm in evaluation mode; null trains all.
        new_lr_scale: factor on lr for the parameters that blocks brought to the model.
        layer_decay: factor on lr from each layer to the one before it, layers as timm groups them.
    """

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    args: dict[str, Any] = field(default_factory=dict)
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    accumulate: int = 1
    clip_grad: float | None = None
    ema: float | None = None
    only: str | list[str] | None = None
    new_lr_scale: float | None = None
    layer_decay: float | None = None

    def __post_init__(self):
        scale, decay = self.new_lr_scale, self.layer_decay
        check("optim.new_lr_scale", scale, scale is None or scale > 0, "positive")
        check("optim.layer_decay", decay, decay is None or 0 < decay <= 1, "in (0, 1]")
        check("optim.only", self.only, self.only is None or self.only, "null, or name what is trained")
        check("optim.lr", self.lr, self.lr > 0, "positive")
        check("optim.min_lr", self.min_lr, 0 <= self.min_lr <= self.lr, "in 0..optim.lr")
        check("optim.weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        check("optim.warmup_epochs", self.warmup_epochs, self.warmup_epochs >= 0, "0 or more")
        check("optim.accumulate", self.accumulate, self.accumulate >= 1, "at least 1")
        check("optim.clip_grad", self.clip_grad, self.clip_grad is None or self.clip_grad > 0, "positive")
        check("optim.ema", self.ema, self.ema is None or 0 <= self.ema < 1, "in [0, 1)")


@dataclass
class RunConfig:
    """What every run has.

    Args:
        model: the network.
        imports: modules of your own to import first, by name: what they register gets its names.
        optim: optimizer and schedule.
        epochs: passes over the training images.
        batch_size: images of one optimizer step, over all processes.
        seed: of everything random.
        device: auto (cuda if there is one), or a torch device such as cpu, cuda, cuda:1.
        threads: CPU threads of the main process; null leaves torch's choice.
        bf16: forward passes under bfloat16 autocast.
        fp16: forward passes under float16 autocast, the loss scaled so that small gradients do not vanish; a step whose
            gradient overflows is left out, and the scale halved.
        compile: compile the model with torch.compile.
        parallel: with several processes, what they share: ddp averages gradients; fsdp also spreads weights, gradients
            and optimizer state.
        sync_bn: BatchNorm over the images of all processes; CUDA only.
        max_bad: largest share of an epoch's training images that may be unreadable; each is replaced by another.
        output: folder for log.csv, checkpoints and the rest.
        overwrite: allow a new run in an output folder that already holds one.
        save_every: optimizer steps from one checkpoint to the next within an epoch; null saves at its end only.
        keep: checkpoints to keep, the newest ones; the best is kept beside them.
        tensorboard: also write the log for TensorBoard.
        resume: checkpoint to go on from, or auto: the newest good one in output, none if there is none.
        eval: checkpoint to evaluate, its model on its images where nothing else is given; or pretrained: the published
            weights of model.name; trains nothing.
        eval_first: evaluate before the first step, too.
        dry_run: print the configuration and what an epoch would take; trains and writes nothing.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    imports: list[str] = field(default_factory=list)
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: int = 10
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    bf16: bool = False
    fp16: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    sync_bn: bool = False
    max_bad: float = 0.001
    output: str = "runs/default"
    overwrite: bool = False
    save_every: int | None = None
    keep: int = 2
    tensorboard: bool = False
    resume: str | None = None
    eval: str | None = None
    eval_first: bool = False
    dry_run: bool = False

    def __post_init__(self):
        for name in ("output", "resume", "eval"):
            path = getattr(self, name)
            setattr(self, name, path and os.path.expanduser(path))
        passes = self.optim.accumulate
        check("epochs", self.epochs, self.epochs >= 1, "at least 1")
        check("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        check("threads", self.threads, self.threads is None or self.threads >= 1, "at least 1")
        allowed = f"a multiple of optim.accumulate = {passes}"
        check("batch_size", self.batch_size, self.batch_size % passes == 0, allowed)
        check("fp16", self.fp16, not (self.fp16 and self.bf16), "false beside bf16")
        check("parallel", self.parallel, not (self.fp16 and self.parallel == "fsdp"), "ddp with fp16")
        check("max_bad", self.max_bad, 0 <= self.max_bad <= 1, "a share in 0..1")
        check("save_every", self.save_every, self.save_every is None or self.save_every >= 1, "at least 1")
        check("keep", self.keep, self.keep >= 1, "at least 1")
        if sum(map(bool, (self.resume, self.eval, self.dry_run))) > 1:
            raise ValueError("resume, eval and dry_run exclude each other")

    @property
    def precision(self) -> str:
        return "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"


@dataclass
class Config(RunConfig):
    """A run that trains a classifier.

    Args:
        data: the images.
        augment: augmentation of training images.
        channels_last: keep images channels-last in memory.
        target_top1: exit with code 1 if the best top-1 accuracy, in percent, stays below this.
    """

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    channels_last: bool = True
    target_top1: float | None = None

    def __post_init__(self):
        super().__post_init__()
        passes = self.optim.accumulate
        if self.augment.mixup or self.augment.cutmix:
            allowed = f"a multiple of 2 × optim.accumulate = {2 * passes} for mixup and cutmix, which pair images"
            check("batch_size", self.batch_size, self.batch_size % (2 * passes) == 0, allowed)


@dataclass
class Asked:
    """What the command line, or a --config FILE in it, gives of these options, or what they are without."""

    eval: str | None
    resume: str | None
    output: str


def asked(description: str, argv: list[str] | None = None, kind: type = Config) -> Asked:
    """Which checkpoint the command line `argv` is about; exits as `parse` does."""
    parser, words = _parser(description, argv, kind)
    given = parser.parse_args(words, defaults=False)
    path = {name: given.get(name, parser.get_default(name)) for name in ("eval", "resume", "output")}
    path = {name: value and os.path.expanduser(value) for name, value in path.items()}
    if path["resume"] or given.get("dry_run"):  # beside which parse refuses eval
        path["eval"] = None
    return Asked(**path)


def parse(
    description: str,
    argv: list[str] | None = None,
    kind: type = Config,
    saved: dict | None = None,
    goes_on: dict | None = None,
):
    """The `kind` of the command line `argv` (default: this process's), on top of any --config FILE in it.

    Options may be written with - for _, and those that are true or false without a value.
    Exits with code 2 and one line that names it for an unknown name, a wrong type or a bad value.

    Args:
        saved: the checkpoint to evaluate, whose model and images are taken where nothing else is given.
        goes_on: the configuration of a run to go on with, taken where nothing else is given.
    """
    parser, words = _parser(description, argv, kind)
    if saved:
        given, added = parser.parse_args(words, defaults=False), saved["insert"] or {}
        parser.set_defaults({"model.name": saved["model"], "imports": saved["imports"]})
        parser.set_defaults({"model.insert": added.get("block"), "model.at": added.get("at")})
        parser.set_defaults({"seed": saved["config"].get("seed", 0)})  # by which images were kept for validation
        source = source_of(saved)
        if given.get("data.name", source["name"]) == source["name"]:
            options = {f"data.{name}": value for name, value in source.items()}
            parser.set_defaults({name: value for name, value in options.items() if name in parser.get_defaults()})
    if goes_on:
        before = dict(_of_options(goes_on, dict(_types(kind))))
        parser.set_defaults({name: value for name, value in before.items() if name not in ONCE})
    namespace = parser.parse_args(words)
    try:
        values = parser.instantiate(namespace)
        values.pop("config")
        return kind(**vars(values))
    except ValueError as error:
        sys.exit(_exit_line(error))


def planned_epochs(description: str, argv: list[str] | None = None, kind: type = Config) -> int | None:
    """Epochs of the configuration file, where the command line `argv` gives others and leaves the target as it is;
    else None."""
    parser, words = _parser(description, argv, kind)
    files, line = [], []
    while words:
        word = words.pop(0)
        to = files if word.partition("=")[0] == "--config" else line
        to.append(word)
        if word == "--config" and words:
            to.append(words.pop(0))
    given = vars(parser.parse_args(line, defaults=False))
    if "epochs" not in given or any(name.startswith("target_") for name in given):
        return None
    return parser.parse_args(files, defaults=False).get("epochs")


def flat(tree: dict, prefix: str = ""):
    """The leaves of nested dicts, by names with dots between."""
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def deciding(config: dict) -> dict:
    """The options that decide a result, by names with dots between."""
    return {k: v for k, v in flat(config) if k not in FREE and k.split(".")[0] != "pictures"}


def _of_options(config: dict, options: dict[str, type], prefix: str = ""):
    """Options and their values; of `config` only what is one of `options`."""
    for name, value in config.items():
        if prefix + name in options:
            yield prefix + name, value
        elif isinstance(value, dict):
            yield from _of_options(value, options, f"{prefix}{name}.")


def source_of(saved: dict) -> dict:
    """Where the images of a checkpoint are: the options of `data` that say so."""
    data = saved["config"]["data"]
    uses = SOURCES[data["name"].partition("/")[0]]
    return {name: data[name] for name in ("name", *uses) if name in data}


def _parser(description: str, argv: list[str] | None, kind: type) -> tuple[Parser, list[str]]:
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; options after it override it")
    parser.add_class_arguments(kind)
    parser.set_defaults({"data.name": None})  # of a DataConfig without arguments, which has chosen already
    return parser, spelled_out(sys.argv[1:] if argv is None else argv, dict(_types(kind)))


def _types(kind: type, prefix: str = ""):
    """Names of options and their types."""
    for one in fields(kind):
        if is_dataclass(one.type):
            yield from _types(one.type, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, one.type


def _exit_line(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
