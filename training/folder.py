"""The output folder of a run: its checkpoints, tables and lists. Only the main process writes.

step-N.pt             checkpoints, the newest few
last.pt, best.pt      further names of the newest and the best
best.safetensors      the weights of the best; its metadata say of what model, of what images
config.json           the same for timm, which makes a model of the folder: timm.create_model("local-dir:FOLDER",
                      pretrained=True); not of models with something inserted, which timm does not know of
log.csv               a row for each epoch
bad_images.csv        training images that could not be read
not_finite.txt        the images of a step whose loss or gradient was not finite
"""

import json
from pathlib import Path

from training import checkpoint
from training.log import read_rows, write_rows
from training.published import timm_config


class Folder:
    """The folder `path` of a run, which holds one history: nothing of other runs, nothing later than where it stands.

    Attributes:
        last: the checkpoint the run stands at or goes on from; None before the first.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.last: Path | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def find(self, resume: str | None, overwrite: bool) -> Path | None:
        """The checkpoint to go on from.

        Raises:
            ValueError: if the folder holds a run that `resume` does not go on with, and not `overwrite`.
            FileNotFoundError: if there is no checkpoint `resume`.
        """
        there = checkpoint.steps(self.path)
        if resume == "auto":
            return checkpoint.newest(self.path)
        if resume is None or not self._holds(Path(resume)):
            if (there or (self / "log.csv").exists()) and not overwrite:
                raise ValueError(
                    f"output {self.path} holds a run already: go on with --resume auto, or give another --output, "
                    "or --overwrite"
                )
        if resume is None:
            return None
        step = checkpoint.load(resume)["step"]
        newer = [path.name for path in there if checkpoint.step_of(path) > step]
        if newer and not overwrite:
            raise ValueError(
                f"{resume} is of step {step}, but output {self.path} holds {newer[0]}: go on with --resume auto, "
                "or give another --output, or --overwrite to drop what is newer"
            )
        return Path(resume)

    def _holds(self, path: Path) -> bool:
        return path.resolve().parent == self.path.resolve()

    def make_room(self, step: int, history: list[dict], metrics: dict) -> bool:
        """Make the folder ready to go on from `step`: nothing half-written, nothing of steps yet to come or of another
        run. Returns whether the best checkpoint of `metrics` is there, if there was one.

        Raises:
            OSError: if the folder can't be written to.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        (self / ".probe.writing").touch()
        before = self.last
        if before and not self._holds(before):
            checkpoint.forget(self.path, None)
            self.last = self / f"step-{step:08d}.pt"
            checkpoint.give_name(before, self.last)
        else:
            checkpoint.forget(self.path, step if before else None)
        (self / ".probe.writing").unlink(missing_ok=True)
        bad = [row for row in read_rows(self / "bad_images.csv") if before and int(row["step"]) <= step]
        for name, rows in (("log.csv", history), ("bad_images.csv", bad)):
            write_rows(self / name, rows) if rows else (self / name).unlink(missing_ok=True)
        if before:
            checkpoint.give_name(self.last, self / "last.pt")
        return "best_step" not in metrics or self._find_best(metrics["best_step"], before)

    def _find_best(self, step: int, before: Path) -> bool:
        """Give the checkpoint of `step` the name of the best: it may have been killed before that, or be elsewhere."""
        for path in (self / "best.pt", self / f"step-{step:08d}.pt", before.with_name("best.pt")):
            try:
                contents = checkpoint.load(path)
            except (ValueError, FileNotFoundError):
                continue
            if contents["step"] == step and contents["metrics"].get("best_step") == step:
                self._name_best(path, contents)
                return True
        return False

    def save(self, contents: dict, best: bool, keep: int):
        """Write a checkpoint; it is also the `last.pt` and, with `best`, the `best.pt`."""
        path = self / f"step-{contents['step']:08d}.pt"
        checkpoint.save(path, **contents)
        self.last = path
        if best:
            self._name_best(path, contents)
        checkpoint.give_name(path, self / "last.pt")
        checkpoint.clean(self.path, keep)

    def _name_best(self, path: Path, contents: dict):
        if path != self / "best.pt":
            checkpoint.give_name(path, self / "best.pt")
        config, insert = timm_config(contents), contents["insert"]
        metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in config.items()}
        metadata |= {"insert": json.dumps(insert)} if insert else {}
        checkpoint.save_weights(self / "best.safetensors", contents["ema"] or contents["state_dict"], metadata)
        if insert:
            (self / "config.json").unlink(missing_ok=True)
        else:
            checkpoint.write_text(self / "config.json", json.dumps(config, indent=2) + "\n")

    def log(self, history: list[dict]):
        """Write the rows of all epochs."""
        write_rows(self / "log.csv", history)

    def tensorboard(self, row: dict):
        """Write the newest row for TensorBoard."""
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(self / "tensorboard", purge_step=row["step"]) as writer:
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    writer.add_scalar(name, value, row["step"])

    def add_bad_images(self, epoch: int, step: int, faults: list[str]):
        """Write down images that could not be read."""
        path = self / "bad_images.csv"
        write_rows(path, read_rows(path) + [{"epoch": epoch, "step": step, "image": fault} for fault in faults])

    def add_suspects(self, names: list[str]) -> str:
        """Write down the images of a step that failed; the first of them in a line."""
        if not names:
            return "shards do not tell which images"
        path = self / "not_finite.txt"
        checkpoint.write_text(path, "\n".join(names) + "\n")
        return f"its images are {', '.join(names[:3])}" + (f" … {len(names)} in {path}" if len(names) > 3 else "")

    def standing(self) -> str:
        """What there is to go on from."""
        if self.last is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.last}; --resume auto goes on from there"
