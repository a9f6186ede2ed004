"""Write a page about a finished run, or about several side by side.

    python report.py --run runs/digits
    python report.py --run runs/pixels --path pixels.html
    python report.py --runs runs/cbam-0 runs/cbam-1 runs/plain-0 runs/plain-1 --path compared.html

Of a classifier: its best and its last epoch, curves, the confusion matrix, each class's accuracy, the surest mistakes,
and a map of each attention block. Of a pixel model: curves, and the newest pictures it drew. Of several runs: what they
reached, with its spread over seeds, what they cost, and their curves in one plot. Exit code 0: done; 2: bad input, with
one line that says what.
"""

import sys
import tempfile
from pathlib import Path

import torch

import backbones
from training import checkpoint, command
from training.comparison import Finished, add_comparison
from training.published import readable
from training.report import (
    Page,
    add_answers,
    add_configuration,
    add_curves,
    add_images,
    add_results,
    facts_of,
    mistakes,
    title_of,
    varied,
)
from training.setup import restore_model
from training.trained import open_trained
from vision_attn.cost import flops, parameters


def report(
    run: str | None = None,
    runs: list[str] | None = None,
    path: str | None = None,
    dir: str | None = None,
    count: int = 24,
) -> None:
    """Writes an HTML file with its pictures inside.

    Args:
        run: folder of a run, with a best.pt.
        runs: instead, folders of several runs, to be put side by side.
        path: the file to write; null: report.html in the run's folder, or here of several.
        dir: where the images are, if not where they were in training.
        count: most mistakes to show; 1 or more.
    """
    if count < 1:
        raise ValueError(f"count={count}: must be 1 or more")
    if (run is None) == (not runs):
        raise ValueError("give either run or runs")
    if runs and dir is not None:
        raise ValueError(f"dir={dir}: must be left out with runs, which reads no images")
    target = Path(path or Path(run or ".") / "report.html")
    page = compare(runs) if runs else about(Path(run), dir, count)
    target.parent.mkdir(parents=True, exist_ok=True)
    page.save(target)
    print(target)


def open_run(folder: Path) -> Finished:
    """The best checkpoint of a run with the history of the newest, and what its model takes."""
    saved, newest = checkpoint.load(folder / "best.pt"), folder / "last.pt"
    if newest.exists():
        last = checkpoint.load(newest)
        saved |= {"history": last["history"], "made": last["made"]}
    model = restore_model(folder / "best.pt", saved, backbones).eval()
    integers = "levels" in saved["data"]  # of a pixel model
    image = torch.zeros(1, *saved["data"]["input_size"], dtype=torch.int64 if integers else torch.float32)
    with torch.no_grad():
        return Finished(str(folder), saved, parameters(model), flops(model, image))


def compare(runs: list[str]) -> Page:
    opened = [open_run(Path(run)) for run in runs]
    page = Page(f"{len(opened)} runs")
    add_comparison(page, opened)
    for run in opened:
        add_configuration(page, run.saved, run.folder)
    return page


def about(folder: Path, dir: str | None, count: int) -> Page:
    run = open_run(folder)
    saved = run.saved
    page = Page(f"{title_of(saved)} on {saved['config']['data']['name']}")
    add_results(page, saved)
    page.facts(facts_of(saved, run.parameters, run.flops))
    add_curves(page, saved)
    if "class_names" in saved["data"]:
        add_classifier(page, folder / "best.pt", dir, count)
    elif dir is not None:
        raise ValueError(f"dir={dir}: a report of a pixel model reads no images")
    else:
        for kind in ("samples", "completions"):
            for picture in sorted(folder.glob(f"{kind}-*.png"))[-1:]:
                page.heading(f"{kind.capitalize()} after epoch {int(picture.stem.split('-')[-1])}")
                page.picture(picture.read_bytes(), kind)
    add_configuration(page, saved)
    return page


def add_classifier(page: Page, path: Path, dir: str | None, count: int):
    trained = open_trained(path, backbones, dir)
    names = readable(trained.classes)
    probabilities, targets = trained.answers()
    add_answers(page, probabilities, targets, names)
    sureness, guesses = probabilities.max(dim=1)

    def titles(indices):
        return [f"{names[targets[i]]}, says\n{names[guesses[i]]} ({100 * sureness[i]:.0f} %)" for i in indices]

    wrong = mistakes(probabilities, targets, count)
    if wrong:
        page.heading("Mistakes", "The surest first.")
        add_images(page, trained.pixels(wrong), titles(wrong), "mistakes")
    shown = varied(targets, 10)
    pixels = trained.pixels(shown)
    try:
        maps = backbones.attention_maps(trained.model, trained.normalised(pixels))
    except ValueError:  # a model without a block of the zoo
        return
    page.heading("Attention", "Where each block looks: a gate's weights, or the attention each place receives.")
    with tempfile.TemporaryDirectory() as folder:
        page.picture(backbones.draw_maps(pixels, maps, Path(folder, "maps.png"), titles(shown)).read_bytes(), "maps")


def main(argv: list[str] | None = None) -> int:
    return command.run(report, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
