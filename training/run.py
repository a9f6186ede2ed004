"""A run from beginning to end: what is trained is a `Task`, everything else is here.

Where training stands is (epoch, steps within it); with weights, moving average and optimizer state that is all a run
needs to go on exactly, since everything random follows from where it stands.
"""

import dataclasses
import sys
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from tqdm import tqdm

from training import checkpoint, distributed
from training.config import PRETRAINED, Asked, RunConfig, asked, deciding, flat, parse, planned_epochs
from training.distributed import Processes, load_optimizer, load_weights, whole
from training.engine import NotFinite, Step, hidden, mean_over, steps
from training.estimate import duration, estimate
from training.folder import Folder
from training.loader import BadImages, Batches, Samples, StreamSamples
from training.machine import hardware, peak_memory
from training.seeding import seed_all
from training.setup import Blocks, create_model, create_state, find_device, first_line, import_modules, restore_model
from training.shards import Shards
from training.signals import Stop
from training.task import Task

NOTHING_DONE = {"steps": 0, "loss": 0.0, "bad": 0}  # of an epoch: steps, the sum of their losses, unreadable images


def main(task: type[Task], kind: type[RunConfig], doc: str, argv: list[str] | None, blocks: Blocks) -> int:
    """Run what the command line `argv` says; returns the exit code.

    Args:
        blocks: the package that adds blocks to models.
    """
    stop = Stop()
    try:
        saved, title = None, doc.splitlines()[0]
        about = asked(title, argv, kind)
        if about.eval not in (None, PRETRAINED):
            try:
                saved = checkpoint.load(about.eval)
            except (ValueError, OSError) as error:
                return _refuse(error)
        config = parse(title, argv, kind, saved, _goes_on(about))
        planned = planned_epochs(title, argv, kind)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        code = _main(task, config, stop, blocks, saved, planned)
        if code == 0:  # else other processes may not be there to wait for
            distributed.stop()
        return code
    finally:
        stop.restore()


def _main(
    task: type[Task], config: RunConfig, stop: Stop, blocks: Blocks, saved: dict | None, planned: int | None
) -> int:
    try:
        import_modules(config.imports)
        processes = distributed.start(find_device(config.device))
        common = task, config, processes, stop, blocks
        run = Evaluation(*common, saved) if config.eval else Training(*common)
    except (ValueError, OSError) as error:
        return _refuse(error)
    try:
        if config.dry_run:
            return estimate(run)
        best = run()
    except FloatingPointError as error:
        return _refuse(f"{error}; {run.standing()}", code=1)
    except (ValueError, OSError) as error:  # of unreadable images, of a forward pass, of a full disk
        return _refuse(f"{_last_line(error)}; {run.standing()}")
    missed = best is not None and run.task.missed(best)
    if missed and planned and config.epochs < planned:
        run.say(f"note: {missed}, which was set for {planned} epochs; these were {config.epochs}")
        return 0
    return _refuse(missed, code=1) if missed else 0


def _goes_on(about: Asked) -> dict | None:
    """The configuration of the run that is to go on, its output where it lies now; None where none can be read."""
    if not about.resume:
        return None
    folder = Path(about.output) if about.resume == "auto" else Path(about.resume).parent
    paths = checkpoint.all_in(folder) if about.resume == "auto" else [Path(about.resume)]
    found = next(filter(None, map(checkpoint.config_of, paths)), None)
    return found and found | {"output": str(folder)}


def _refuse(error: Exception | str, code: int = 2) -> int:
    print(f"error: {printable(_last_line(error))}", file=sys.stderr, flush=True)
    return code


def _last_line(error: Exception | str) -> str:
    """What is wrong in one line: the last, since a loader process's error holds its whole traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def printable(text: str) -> str:
    """`text` with bytes of file names that are no UTF-8 spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


class Run:
    """What training and evaluation share."""

    def __init__(self, config: RunConfig, processes: Processes, stop: Stop, blocks: Blocks):
        self.config, self.processes, self.stop, self.blocks = config, processes, stop, blocks
        share = processes.size * config.optim.accumulate
        if config.batch_size % share:
            each = f"{processes.size} processes × {config.optim.accumulate} passes"
            raise ValueError(f"batch_size must be a multiple of {share} ({each}), got {config.batch_size}")
        self.spread = config.parallel == "fsdp" and processes.size > 1 and not config.eval
        half = torch.float16 if config.fp16 else torch.bfloat16
        self.autocast = torch.autocast(processes.device.type, half, enabled=config.fp16 or config.bf16)

    def create_batches(self, dataset, transform, data: dict, shuffle: bool = False) -> Batches:
        """Batches of a data set of the task, divided among the processes."""
        config, task = self.config, self.task
        samples = StreamSamples if isinstance(dataset, Shards) else Samples
        return Batches(
            samples(dataset, transform, task.model_args["in_chans"], config.seed),
            config.batch_size // (config.optim.accumulate * self.processes.size),
            data["mean"],
            data["std"],
            shuffle=shuffle,
            multiple=config.optim.accumulate if shuffle else 1,
            seed=config.seed,
            workers=config.data.workers,
            num_classes=task.num_classes,
            processes=self.processes,
            memory_format=task.memory_format,
        )

    def evaluate(self, model: nn.Module) -> dict[str, float] | None:
        """The metrics over all images to evaluate; None if the run was asked to stop."""
        return mean_over(
            model,
            self.val_batches,
            self.task.measure,
            self.autocast,
            self.processes,
            together=self.spread,
            asked_to_stop=lambda: self.stop.reason is not None,
        )

    @torch.no_grad()
    def try_forward(self, model: nn.Module, resize: bool = False):
        """ValueError if the model does not take the images; `resize` first brings what it has learned to their size."""
        images, targets, _ = self.val_batches.blank()
        try:
            if resize:
                model.set_input_size(img_size=tuple(images.shape[-2:]))  # timm's, which makes masks on the CPU
                model.to(images.device)
            self.task.measure(model.eval(), images, targets)
        except (RuntimeError, AssertionError, ValueError) as error:
            size = "×".join(map(str, images.shape[1:]))
            raise ValueError(f"{self.config.model.name} does not take images of {size}: {first_line(error)}") from error

    def standing(self) -> str:
        """What there is to go on from."""
        return "nothing was written"

    def introduce(self):
        """Say what runs, and what was left out of the images."""
        self.say(self.describe())
        for note in self.task.notes:
            self.say(f"note: {note}")

    def describe(self) -> str:
        """Model, data and machine in a line."""
        raise NotImplementedError

    def source(self) -> str:
        """Where the images are from."""
        data = self.config.data
        return f"{data.name} {data.dir}" if data.dir else data.name

    def say(self, line: str):
        """Print a line, once for all processes."""
        if self.processes.main:
            print(printable(line), flush=True)


class Evaluation(Run):
    """A checkpoint, or published weights where `saved` is None, and the images to evaluate it on; called, prints its
    metrics and returns the one that counts."""

    def __init__(
        self, task: type[Task], config: RunConfig, processes: Processes, stop: Stop, blocks: Blocks, saved: dict | None
    ):
        super().__init__(config, processes, stop, blocks)
        self.task = task(config, processes, saved)
        self.model = self.restore(saved) if saved else self.published()
        self.data = self.task.data(self.model)
        self.model.to(processes.device, memory_format=self.task.memory_format)
        self.val_batches = self.create_batches(self.task.val_set, self.task.transforms(self.data)[1], self.data)
        other = saved and self.data["input_size"] != saved["data"]["input_size"]
        self.try_forward(self.model, resize=other and hasattr(self.model, "set_input_size"))
        if config.compile:
            self.model.compile()

    def published(self) -> nn.Module:
        """The model of the configuration, with its published weights."""
        model = self.config.model
        return create_model(model.name, self.task.model_args, True, model.inserted, self.blocks)

    def restore(self, saved: dict) -> nn.Module:
        """The model of a checkpoint."""
        config = self.config
        inserted = saved["insert"] or {"block": None, "at": None}
        for option, name in (("name", saved["model"]), ("insert", inserted["block"]), ("at", inserted["at"])):
            if (given := getattr(config.model, option)) != name:
                raise ValueError(f"model.{option} is {given}, but {config.eval} holds {name}")
        return restore_model(config.eval, saved, self.blocks, self.task.model_args, config.model.attn_args)

    def __call__(self) -> float | None:
        self.introduce()
        metrics = self.evaluate(self.model)
        if metrics is None:
            self.say(f"stopped by {self.stop.reason}")
            return None
        self.say("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return metrics[self.task.best_of]

    def describe(self) -> str:
        """Model and data in a line."""
        size = "×".join(map(str, self.data["input_size"]))
        return (
            f"{self.config.eval}: {self.config.model.title}, input {size}, {self.task.title(self.data)}; "
            f"{self.source()}: {self.val_batches.num_images} to evaluate"
        )


class Training(Run):
    """A model, its images, and where its training stands; called, trains and returns the best metric, or None if it was
    asked to stop before the end. Its constructor writes nothing."""

    def __init__(self, task: type[Task], config: RunConfig, processes: Processes, stop: Stop, blocks: Blocks):
        super().__init__(config, processes, stop, blocks)
        self.output = Folder(config.output)
        self.output.last = self.find_checkpoint()
        self.saved_step = 0
        saved = checkpoint.load(self.output.last) if self.output.last else None
        if config.tensorboard and not find_spec("tensorboard"):
            raise ValueError("tensorboard is true, but the package tensorboard is not installed")
        self.task = task(config, processes, None)
        name, args, inserted = config.model.name, self.task.model_args, config.model.inserted
        if saved and (saved["model"], saved["model_args"]) != (name, args):
            raise ValueError(f"{self.output.last} holds {saved['model']} {saved['model_args']}, not {name} {args}")
        if saved and saved["insert"] != inserted:
            raise ValueError(f"{self.output.last} has {saved['insert']} inserted, not {inserted}")

        seed_all("model", config.seed)
        model = create_model(name, args, config.model.pretrained and not saved, inserted, blocks)
        self.task.prepare(model)
        model.to(processes.device, memory_format=self.task.memory_format)
        if config.sync_bn:
            if processes.device.type != "cuda":
                raise ValueError(f"sync_bn must be false on {processes.device.type}: torch has it for CUDA only")
            model = convert_sync_batchnorm(model)
        data = self.task.data(model) | {"train_images": len(self.task.train_set)}
        train_transform, eval_transform = self.task.transforms(data)
        self.train_batches = self.create_batches(self.task.train_set, train_transform, data, shuffle=True)
        self.val_batches = self.create_batches(self.task.val_set, eval_transform, data)
        self.try_forward(model)
        self.steps_per_epoch = self.train_batches.num_batches // config.optim.accumulate
        steps = self.steps_per_epoch
        self.state = create_state(config, model, self.task.loss, steps, processes, blocks, self.spread)

        self.epoch = 0
        self.within = NOTHING_DONE
        self.metrics, self.history = {}, []
        self.record = dict(
            model=name,
            model_args=args,
            insert=inserted,
            imports=config.imports,
            data=data,
            config=dataclasses.asdict(config),
            versions=checkpoint.versions(processes.size),
        )
        if saved:
            self.restore(saved)

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, which the main process finds."""
        if self.config.dry_run:
            return None
        return self.processes.of_main(lambda: self.output.find(self.config.resume, self.config.overwrite))

    def restore(self, saved: dict):
        """Go on from the checkpoint `saved`."""
        state, config = self.state, self.config
        if (state.ema is None) != (saved["ema"] is None):
            raise ValueError(
                f"optim.ema is {config.optim.ema}, but {self.output.last} "
                f"has {'no' if saved['ema'] is None else 'a'} moving average"
            )
        then, now = ((side["data"]["train_images"], side["config"]["batch_size"]) for side in (saved, self.record))
        if then != now:
            sizes = "{} training images in batches of {}"
            raise ValueError(f"{self.output.last} is of {sizes.format(*then)}, not {sizes.format(*now)}")
        then, now = (side["data"].get("class_names") for side in (saved, self.record))
        if then != now:
            raise ValueError(f"{self.output.last} knows the classes {then}, the data have {now}")
        kept = "name", "momentum", "weight_decay", "args", "only", "new_lr_scale", "layer_decay"
        for key in kept:  # which the optimizer's own state brings back
            then, now = (side["config"]["optim"].get(key) for side in (saved, self.record))
            if then != now:
                raise ValueError(f"optim.{key} must be {then!r}, as in {self.output.last}, got {now!r}")
        load_weights(state.model, saved["state_dict"])
        load_optimizer(state.optimizer, saved["optimizer"])
        if saved["scaler"] and state.scaler.is_enabled():
            state.scaler.load_state_dict(saved["scaler"])
        if state.ema:
            load_weights(state.ema.module, saved["ema"])
        self.epoch, state.step, self.within = saved["epoch"], saved["step"], dict(saved["within"])
        self.metrics, self.history = saved["metrics"], list(saved["history"])
        state.scheduler.step_update(state.step)
        self.saved_step = state.step
        self.say(f"goes on from {self.output.last}: epoch {self.epoch + 1}, step {state.step}")
        order = {"data.workers"} if isinstance(self.task.train_set, Shards) else set()
        for name, now, then in _differences(self.record, saved, order):
            self.say(f"note: {name} is {now} now and was {then}, so the result may differ from an unbroken run's")

    def __call__(self) -> float | None:
        kept = self.output.make_room(self.state.step, self.history, self.metrics) if self.processes.main else None
        if not self.processes.from_main(kept):
            self.say(f"note: best.pt, of step {self.metrics['best_step']}, is gone: now the best from here on counts")
            self.metrics = {key: value for key, value in self.metrics.items() if not key.startswith("best_")}
        self.introduce()
        if self.config.eval_first and self.state.step == 0:
            metrics = self.evaluate(self.state.evaluated)
            if metrics is None:
                return self.leave()
            self.say("before training  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        while self.epoch < self.config.epochs:
            start = time.perf_counter()
            done = self.within["steps"]
            if not self.train():
                return self.leave()
            speed = (self.steps_per_epoch - done) * self.config.batch_size / (time.perf_counter() - start)
            self.save()  # so that no trouble in evaluation costs the epoch
            metrics = self.evaluate(self.state.evaluated)
            if metrics is None:
                return self.leave()
            self.finish_epoch(metrics, speed, start)
        self.say(f"best {self.task.best_of} {self.best:.4f}, in {self.output / 'best.pt'}")
        return self.best

    @property
    def best(self) -> float:
        """The best there was."""
        return self.metrics.get(f"best_{self.task.best_of}", -self.task.sign * float("inf"))

    def train(self) -> bool:
        """The rest of the epoch; False if the run was asked to stop within it."""
        config, state = self.config, self.state
        self.within = within = {"lr": state.lr} | self.within
        start = within["steps"]
        if self.stop_asked() and start < self.steps_per_epoch:
            return False
        bar = tqdm(
            total=self.train_batches.num_images,
            initial=start * config.batch_size,
            desc=f"epoch {self.epoch + 1}/{config.epochs}",
            unit=" images",
            leave=False,
            disable=hidden(self.processes),
        )
        with bar:
            try:
                for step in self.steps(start):
                    within["steps"] += 1
                    within["loss"] += step.loss
                    if step.num_faults:
                        self.note_faults(step)
                    mean = within["loss"] / within["steps"]
                    bar.set_postfix(loss=f"{mean:.3f}", lr=f"{state.lr:.2g}", refresh=False)
                    bar.update(config.batch_size)
                    if step.stop:
                        return False
                    if config.save_every and state.step % config.save_every == 0:
                        self.save()
            except NotFinite as error:
                names = self.train_batches.names(self.epoch, within["steps"])
                suspects = f"; {self.output.add_suspects(names)}" if self.processes.main else ""
                raise FloatingPointError(f"{error}{suspects}") from error
        return True

    def steps(self, start: int = 0):
        """The steps of the epoch, from number `start` of it on."""
        config = self.config
        return steps(
            self.state,
            self.train_batches,
            self.epoch,
            start,
            config.seed,
            config.optim.accumulate,
            config.optim.clip_grad,
            self.autocast,
            self.processes,
            asked_to_stop=lambda: self.stop.reason is not None,
        )

    def stop_asked(self) -> bool:
        """Whether any process was asked to stop."""
        return self.processes.sum([self.stop.reason is not None])[0] > 0

    def note_faults(self, step: Step):
        """Write down the unreadable images of a step; BadImages if there are too many in this epoch."""
        faults = sum(self.processes.gather(step.faults), [])
        self.within["bad"] += len(faults)
        if self.processes.main:
            self.output.add_bad_images(self.epoch + 1, self.state.step, faults)
        bad, images = self.within["bad"], self.train_batches.num_images
        if bad > self.config.max_bad * images:
            raise BadImages(
                f"{bad} of the epoch's {images} training images can't be read, more than max_bad = "
                f"{self.config.max_bad:g}; the last is {faults[-1]}; all are in {self.output / 'bad_images.csv'}"
            )

    def finish_epoch(self, metrics: dict[str, float], speed: float, start: float):
        """Log, save and show an epoch whose images to evaluate gave `metrics`."""
        task, state, config = self.task, self.state, self.config
        train_loss, bad, lr = self.within["loss"] / self.within["steps"], self.within["bad"], self.within["lr"]
        self.epoch += 1
        better = task.sign * metrics[task.best_of] > task.sign * self.best
        best = {f"best_{task.best_of}": metrics[task.best_of], "best_step": state.step}
        self.metrics = self.metrics | metrics | (best if better else {})
        self.within = NOTHING_DONE
        seconds = time.perf_counter() - start
        row = {"epoch": self.epoch, "step": state.step, "lr": lr, **task.columns(train_loss, metrics)}
        self.history.append(row | {"images_per_second": speed, "seconds": seconds})
        task.draw(self)
        if self.processes.main and config.tensorboard:
            self.output.tensorboard(self.history[-1])
        self.save(better)
        if self.processes.main:
            self.output.log(self.history)
        left = (config.epochs - self.epoch) * seconds
        self.say(
            f"epoch {self.epoch}/{config.epochs}  lr {row['lr']:.3g}  {task.told(row)}  {speed:.0f} images/s  "
            f"{seconds:.0f} s" + (f", about {duration(left)} left" if left else "")
        )
        if bad:
            self.say(
                f"note: unreadable images, replaced by others: {bad}; they are in {self.output / 'bad_images.csv'}"
            )

    def whole_model(self) -> nn.Module:
        """What is evaluated, in one piece in every process. Every process must call it."""
        if not self.spread:
            return self.state.evaluated
        record = self.record
        model = create_model(record["model"], record["model_args"], insert=record["insert"], blocks=self.blocks)
        model.load_state_dict(whole(self.state.evaluated.state_dict()))
        return model.to(self.processes.device)

    def made(self) -> dict:
        """On what, when, and in how much memory."""
        device = self.processes.device
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
        return {"hardware": hardware(device), "date": now, "memory": peak_memory(device)}

    def save(self, best: bool = False):
        """Write a checkpoint of where training stands. Every process must call it."""
        state = self.state
        self.processes.share_buffers(state.model, state.ema and state.ema.module)
        contents = self.record | dict(
            state_dict=whole(state.model.state_dict()),
            ema=whole(state.ema.module.state_dict()) if state.ema else None,
            optimizer=whole(state.optimizer.state_dict()),
            scaler=state.scaler.state_dict() if state.scaler.is_enabled() else None,
            epoch=self.epoch,
            step=state.step,
            within=self.within,
            metrics=self.metrics,
            history=self.history,
            made=self.made(),
        )
        if self.processes.main:
            self.output.save(contents, best, self.config.keep)
        self.saved_step = state.step

    def leave(self) -> None:
        """Save and say goodbye."""
        reason = next(filter(None, self.processes.gather(self.stop.reason)))
        if self.state.step != self.saved_step:
            self.save()
        self.say(f"stopped by {reason} at step {self.state.step}, epoch {self.epoch + 1}; {self.standing()}")

    def standing(self) -> str:
        return self.output.standing()

    def describe(self) -> str:
        """Model, data and machine in a line."""
        parameters = sum(p.numel() for p in self.state.model.parameters()) / 1e6
        config, data, processes = self.config, self.record["data"], self.processes
        size = "×".join(map(str, data["input_size"]))
        together = f" × {processes.size} ({config.parallel})" if processes.size > 1 else ""
        return (
            f"{config.model.title}: {parameters:.2f} M parameters, input {size}, {self.task.title(data)}; "
            f"{self.source()}: {self.train_batches.num_images} images an epoch, "
            f"{self.val_batches.num_images} to evaluate; {processes.device}{together}, "
            f"{torch.get_num_threads()} threads, {config.precision}, torch {torch.__version__}"
        )


def _differences(record: dict, saved: dict, order: set[str]) -> list[tuple]:
    """(name, now, then) of what decides a result and is not what the checkpoint has; `order` decides it here, too."""
    now, then = (
        deciding(side["config"]) | {k: v for k, v in flat(side["config"]) if k in order} | side["versions"]
        for side in (record, saved)
    )
    return [(key, now[key], then[key]) for key in now if key in then and now[key] != then[key]]
