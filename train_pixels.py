"""Train a pixel-autoregressive model of images, and draw from it; or evaluate a checkpoint.

    python train_pixels.py --config configs/digits_pixels.yaml
    python train_pixels.py --config configs/digits_pixels.yaml --model.args.blocks dense --output runs/dense
    python train_pixels.py --config configs/digits_pixels.yaml --resume runs/pixels/last.pt
    python train_pixels.py --config configs/digits_pixels.yaml --eval runs/pixels/best.pt

Writes log.csv, last.pt, best.pt and pictures to the output folder: samples-EPOCH.png, and completions-EPOCH.png with
what is given above, what the model makes of it in the middle, and the test images below. Exit code 0: done; 1: the loss
was not finite, or bits per dimension stayed above target_bits; 2: bad input, with one line that says what.
"""

import dataclasses
import sys
import time
from pathlib import Path

import timm
import torch

import backbones  # noqa: F401  registers the named models
from training import checkpoint
from training.config import parse
from training.engine import current_lr, train_one_epoch
from training.loader import Batches, Samples
from training.log import CsvLog
from training.pixels import LEVELS, SIZES, PixelConfig, create_images, evaluate_bits, integers, save_pictures
from training.seeding import seed_all, seed_of
from training.setup import create_model, create_state, find_device

COLUMNS = ("epoch", "step", "lr", "train_bits", "test_bits", "images_per_second", "seconds")


def main(argv: list[str] | None = None) -> int:
    config = parse(__doc__.splitlines()[0], argv, PixelConfig)
    try:
        run = Evaluation(config) if config.eval else Training(config)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        bits = run()
    except FloatingPointError as error:
        print(f"error: {error}; the checkpoints in {config.output} are of the epochs before", file=sys.stderr)
        return 1
    if config.target_bits is not None and bits > config.target_bits:
        print(f"error: {bits:.3f} bits per dimension are above the target {config.target_bits:.3f}", file=sys.stderr)
        return 1
    return 0


class Run:
    """What training and evaluation share. Constructors raise ValueError or FileNotFoundError for all bad input."""

    def __init__(self, config: PixelConfig, in_chans: int):
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.in_chans = in_chans
        self.device = find_device(config.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16)
        self.train_set, self.test_set = create_images(config.data, in_chans)

    def create_batches(self, dataset, img_size: int, **kwargs) -> Batches:
        seed = self.config.seed
        return Batches(
            Samples(dataset, integers(img_size), self.in_chans, seed),
            self.config.batch_size // self.config.optim.accumulate,
            mean=(0.0,) * self.in_chans,  # of no effect on integers
            std=(1.0,) * self.in_chans,
            seed=seed,
            workers=self.config.data.workers,
            device=self.device,
            **kwargs,
        )


class Evaluation(Run):
    """A checkpoint and the test images; called, prints and returns bits per dimension."""

    def __init__(self, config: PixelConfig):
        saved = checkpoint.load(config.eval)
        args = saved["model_args"]
        if args.get("levels") != LEVELS[config.data.name]:
            has = f"{config.data.name} has {LEVELS[config.data.name]}"
            raise ValueError(f"{config.eval} holds a model of {args.get('levels')} levels, {has}")
        super().__init__(config, args["in_chans"])
        self.model = create_model(saved["model"], args).to(self.device)
        self.model.load_state_dict(saved["ema"] or saved["state_dict"])
        self.batches = self.create_batches(self.test_set, args["img_size"])
        if config.compile:
            self.model.compile()

    def __call__(self) -> float:
        metrics = evaluate_bits(self.model, self.batches, self.autocast)
        print(f"bits_per_dim {metrics['bits_per_dim']:.4f}", flush=True)
        return metrics["bits_per_dim"]


class Training(Run):
    """A model, its images, and where its training stands; called, trains and returns the best bits per dimension."""

    def __init__(self, config: PixelConfig):
        name, args = config.model.name, complete_model_args(config)
        super().__init__(config, args["in_chans"])
        self.output = Path(config.output)
        if not (config.resume or config.overwrite) and any(map(Path.exists, self.files("log.csv", "last.pt"))):
            raise ValueError(
                f"output {self.output} holds a run already: go on with --resume {self.output}/last.pt, "
                "or give another --output, or --overwrite true"
            )

        saved = checkpoint.load(config.resume) if config.resume else None
        if saved and (saved["model"], saved["model_args"]) != (name, args):
            raise ValueError(f"{config.resume} holds {saved['model']} {saved['model_args']}, not {name} {args}")
        seed_all("model", config.seed)
        model = create_model(name, args, pretrained=config.model.pretrained and not saved).to(self.device)
        model.set_grad_checkpointing(config.recompute)

        accumulate = config.optim.accumulate
        self.train_batches = self.create_batches(self.train_set, args["img_size"], shuffle=True, multiple=accumulate)
        self.test_batches = self.create_batches(self.test_set, args["img_size"])
        self.state = create_state(config.optim, model, config.epochs, self.train_batches.num_batches // accumulate)
        self.epoch, self.best = 0, float("inf")
        if saved:
            self.restore(saved)
        if config.compile:
            model.compile()
            if self.state.ema:
                self.state.ema.module.compile()
        self.record = dict(
            model=name,
            model_args=args,
            data=dict(input_size=[args["in_chans"], args["img_size"], args["img_size"]], levels=args["levels"]),
            config=dataclasses.asdict(config),
            versions=checkpoint.versions(),
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
        self.epoch, state.step, self.best = saved["epoch"], saved["step"], saved["metrics"]["best_bits_per_dim"]
        state.scheduler.step_update(state.step)

    def __call__(self) -> float:
        config, state = self.config, self.state
        self.output.mkdir(parents=True, exist_ok=True)
        log = CsvLog(self.output / "log.csv", self.epoch, COLUMNS)
        print(self.describe(), flush=True)
        while self.epoch < config.epochs:
            start, lr = time.perf_counter(), current_lr(state)
            train_bits = train_one_epoch(
                state,
                self.train_batches,
                lambda images, _: state.model.bits_per_dim(images),
                self.epoch,
                config.seed,
                config.optim.accumulate,
                config.optim.clip_grad,
                self.autocast,
            )
            speed = self.train_batches.num_images / (time.perf_counter() - start)
            metrics = evaluate_bits(state.evaluated, self.test_batches, self.autocast)
            bits = metrics["bits_per_dim"]

            self.epoch += 1
            better = bits < self.best
            self.best = min(self.best, bits)
            for path in self.files("last.pt", "best.pt") if better else self.files("last.pt"):
                checkpoint.save(
                    path,
                    **self.record,
                    state_dict=state.model.state_dict(),
                    ema=state.ema.module.state_dict() if state.ema else None,
                    optimizer=state.optimizer.state_dict(),
                    epoch=self.epoch,
                    step=state.step,
                    metrics=metrics | {"best_bits_per_dim": self.best},
                )
            seconds = time.perf_counter() - start
            log.write(
                epoch=self.epoch,
                step=state.step,
                lr=lr,
                train_bits=train_bits,
                test_bits=bits,
                images_per_second=speed,
                seconds=seconds,
            )
            print(
                f"epoch {self.epoch}/{config.epochs}  lr {lr:.3g}  train {train_bits:.3f}  test {bits:.3f} bits/dim  "
                f"{speed:.0f} images/s  {seconds:.0f} s",
                flush=True,
            )
            every = config.pictures.every
            if every and (self.epoch % every == 0 or self.epoch == config.epochs):
                self.draw()
        print(f"best {self.best:.3f} bits/dim, in {self.output}/best.pt", flush=True)
        return self.best

    def draw(self):
        """Write samples and completions; what is drawn depends on (seed, epoch) alone."""
        pictures, model, levels = self.config.pictures, self.state.evaluated, self.record["data"]["levels"]
        generator = torch.Generator(self.device).manual_seed(seed_of("draw", self.config.seed, self.epoch))
        options = dict(temperature=pictures.temperature, top_k=pictures.top_k, generator=generator)
        progress = sys.stderr.isatty()
        samples = model.generate(pictures.count, progress=progress, **options)
        save_pictures(self.output / f"samples-{self.epoch:04d}.png", list(samples.split(8)), levels)

        count = min(pictures.count, len(self.test_set))
        whole = torch.stack([self.test_batches.loader.dataset[0, i][0] for i in range(count)]).to(self.device)
        rows = whole.shape[-2] // 2
        given = whole.clone()
        given[..., rows:, :] = levels // 2
        done = model.generate(whole, rows, progress=progress, **options)
        save_pictures(self.output / f"completions-{self.epoch:04d}.png", [given, done, whole], levels)

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.state.model.parameters()) / 1e6
        data = self.record["data"]
        size = "×".join(map(str, data["input_size"]))
        return (
            f"{self.config.model.name}: {parameters:.2f} M parameters, input {size}, {data['levels']} levels; "
            f"{self.config.data.name}: {self.train_batches.num_images} images an epoch, "
            f"{self.test_batches.num_images} to evaluate; {self.device}, {torch.get_num_threads()} threads, "
            f"{'bf16' if self.config.bf16 else 'fp32'}, torch {torch.__version__}"
        )


def complete_model_args(config: PixelConfig) -> dict:
    """The arguments of timm.create_model: those of the configuration, and what follows from the data."""
    data = config.data
    published = timm.get_pretrained_cfg(config.model.name)
    size = data.img_size or SIZES[data.name] or (published and published.input_size[-1])
    follows = {"img_size": size, "levels": LEVELS[data.name]}
    args = {"in_chans": 1 if data.name == "digits" else 3} | follows | config.model.args
    for key, value in follows.items():
        if args[key] != value:
            raise ValueError(f"model.args.{key} is {args[key]}, but {data.name} has {value}")
    return args


if __name__ == "__main__":
    sys.exit(main())
