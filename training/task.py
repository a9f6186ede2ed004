"""What the scripts have of their own: a `Task` for each kind of model. Everything else of a run is in run.py."""

import torch
from torch import Tensor, nn

from training.config import RunConfig
from training.distributed import Processes


class Task:
    """What is trained: images, a model's arguments, a loss, a measure. Its constructor raises ValueError for bad input.

    Args:
        config: the run.
        processes: of the run.
        saved: the checkpoint to evaluate, or None.
    """

    best_of: str  # name of the metric that says which checkpoint is best
    sign: int  # 1: the larger the better; -1: the smaller
    train_set: object  # may be None where a checkpoint is evaluated
    val_set: object
    notes: list[str]  # what was left out of them
    model_args: dict  # of timm.create_model, in_chans among them
    num_classes: int | None = None
    memory_format = torch.contiguous_format

    def __init__(self, config: RunConfig, processes: Processes, saved: dict | None):
        raise NotImplementedError

    def prepare(self, model: nn.Module):
        """Settings of a new model that are no arguments of it."""

    def data(self, model: nn.Module) -> dict:
        """What a checkpoint has to know of the images: plain types; mean and std of each channel, input_size, ..."""
        raise NotImplementedError

    def transforms(self, data: dict) -> tuple:
        """For training and for evaluation: from PIL image to tensor."""
        raise NotImplementedError

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch."""
        raise NotImplementedError

    def measure(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Means over a batch, `best_of` among them."""
        raise NotImplementedError

    def columns(self, train_loss: float, metrics: dict[str, float]) -> dict[str, float]:
        """The numbers of an epoch, as the log has them."""
        raise NotImplementedError

    def title(self, data: dict) -> str:
        """What the data are, in two words."""
        raise NotImplementedError

    def told(self, row: dict) -> str:
        """The same in a line for people."""
        raise NotImplementedError

    def missed(self, best: float) -> str | None:
        """What to say where the best is worse than its target."""
        raise NotImplementedError

    def draw(self, run: "Training"):
        """Pictures of the epoch that has just ended. Every process calls it, the main one writes."""
