"""Write a page about a finished run: curves, confusion, mistakes, and where its attention looks.

    python report.py --run runs/digits
    python report.py --run runs/pixels --path pixels.html

Of a classifier: the log's curves, the confusion matrix, each class's accuracy, the surest mistakes, and a map of each
attention block. Of a pixel model: curves, and the newest pictures it drew. Exit code 0: done; 2: bad input, with one
line that says what.
"""

import sys
import tempfile
from pathlib import Path

import backbones
from training import checkpoint, command
from training.report import Page, add_answers, add_images, add_run, mistakes, varied
from training.trained import open_trained


def report(run: str, path: str | None = None, dir: str | None = None, count: int = 24) -> None:
    """Writes an HTML file with its pictures inside.

    Args:
        run: folder of a run, with a best.pt.
        path: the file to write; null: report.html in the run's folder.
        dir: where the images are, if not where they were in training.
        count: most mistakes to show; 1 or more.
    """
    if count < 1:
        raise ValueError(f"count={count}: must be 1 or more")
    folder = Path(run)
    saved = checkpoint.load(folder / "best.pt")
    page = Page(f"{saved['model']} on {saved['config']['data']['name']}")
    newest = folder / "last.pt"
    add_run(page, saved | {"history": checkpoint.load(newest)["history"]} if newest.exists() else saved)
    if "class_names" in saved["data"]:
        add_classifier(page, folder / "best.pt", dir, count)
    elif dir is not None:
        raise ValueError(f"dir={dir}: a report of a pixel model reads no images")
    else:
        for kind in ("samples", "completions"):
            for picture in sorted(folder.glob(f"{kind}-*.png"))[-1:]:
                page.heading(f"{kind.capitalize()} after epoch {int(picture.stem.split('-')[-1])}")
                page.picture(picture.read_bytes(), kind)
    path = Path(path or folder / "report.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    print(path)


def add_classifier(page: Page, path: Path, dir: str | None, count: int):
    trained = open_trained(path, backbones, dir)
    probabilities, targets = trained.answers()
    add_answers(page, probabilities, targets, trained.classes)
    sureness, guesses = probabilities.max(dim=1)

    def titles(indices):
        names = trained.classes
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
