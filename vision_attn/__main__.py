"""The zoo on the command line: ``python -m vision_attn COMMAND``, each with ``--help``.

Commands: list, show, cost, recommend, check, readme.

Exit code 0: done; 1: `check` found a wrong answer; 2: bad input, with one line that says what.
"""

import argparse
import ast
import re
import sys
import warnings
from pathlib import Path

import torch

from . import answers, cost, draw
from .engines.route import taken_routes
from .grid import Grid
from .mixer import Mixer
from .recommend import in_a_sentence, recommend
from .zoo import block_class, create_block, create_layer, describe, list_blocks, parameters

BEGIN, END = "<!-- blocks: begin -->", "<!-- blocks: end -->"


def show_list(blocks: str) -> None:
    entries = [describe(name) for name in list_blocks(blocks)]
    if not entries:
        raise ValueError(f"blocks={blocks!r}: no block matches")
    sources = [f"{e.source}, {e.url}" if e.url else e.title for e in entries]
    columns([(e.name, e.kind, e.causal * "causal", e.cost, source) for e, source in zip(entries, sources)], texts=5)


def show_looks(
    block: str,
    size: Grid | None,
    query: tuple | None,
    png: Path | None,
    image: Path | None,
    options: list,
    dim: int,
    seed: int,
) -> None:
    entry, pixels = describe(block), image and draw.read_image(image)
    size = size or (Grid(12, 16) if pixels is None else proportioned(*pixels.shape[1:]))
    query = query or (size.height // 2, size.width // 2)
    torch.manual_seed(seed)
    found = draw.looks(created(create_block, block, dim, options), size, query, seed, pixels)
    query = query if entry.kind == "mixer" else None
    of, where = f" of {image.name}" if image else "", "query {},{}".format(*query) if query else "every position"
    title = f"{block} on {size.height}×{size.width}{of}, {where}"
    if png:
        print(draw.picture(found, title, png, query, pixels))
    else:
        print(
            entry.title,
            f"options: {options_of(block)}",
            title,
            *(f"\n{look.title}\n{look.text}" for look in found),
            sep="\n",
        )


def proportioned(height: int, width: int, longer: int = 32) -> Grid:
    """A grid of an image's proportions."""
    return Grid(*(max(1, round(longer * n / max(height, width))) for n in (height, width)))


def show_cost(block: str, size: Grid, dim: int, device: str, options: list, seconds: float) -> None:
    gate = describe(block).kind == "gate"
    make, shape, grid = (create_layer, (1, dim, *size), []) if gate else (create_block, (1, size.size, dim), [size])
    made = {block: created(make, block, dim, options, device=device)}
    causal = [("causal", True)] if not gate and made[block].causal else []
    made.setdefault("dense", created(make, "dense", dim, causal, device=device))
    with taken_routes() as taken:
        made[block](torch.randn(shape, device=device), *grid)
    costs = cost.measure(made, torch.randn(shape, device=device), *grid, seconds=seconds)
    rows = [
        (n, digits(c.flops / 1e9), f"{c.parameters:,}", digits(c.mebibytes), digits(c.ms)) for n, c in costs.items()
    ]
    ratios = [digits(own / dense) for own, dense in zip(costs[block], costs["dense"])]
    print(f"{'layers on a map' if gate else 'whole blocks'}, {setting(size, dim, device)}")
    columns([("", "GFLOP", "parameters", "MiB", "ms"), *rows, ("/ dense", *ratios)])
    said = describe(block)
    print("GFLOP: matrix products and convolutions of a forward; MiB: peak, ms: fastest, of forward + backward")
    if said.cost:
        more = f"{said.computed} × as many computed at 64×64"
        print(f"by its docstring: {said.cost} multiply-adds beside projections, {more}")
    if taken:
        print(f"route: {' and '.join(sorted(taken))}")


def show_recommended(
    size: Grid,
    dim: int,
    device: str,
    causal: bool,
    blocks: list[str],
    options: list,
    seconds: float,
    batch: int,
    dtype: str,
) -> None:
    more = dict(batch=batch, dtype=getattr(torch, dtype), blocks=blocks, options=dict(options), seconds=seconds)
    found = recommend(*size, dim, device, causal, **more)
    where = f"{setting(size, dim, device)}, {dtype}, {batch} image{'s' * (batch > 1)}"
    print(f"{causal * 'causal '}mixers, whole blocks, forward + backward, {where}")
    rows = [(name, str(heads), *map(digits, numbers), route) for name, heads, *numbers, route in found]
    columns([("", "heads", "ms", "/ dense", "MiB", "/ dense", "route"), *rows])
    print(in_a_sentence(found))
    print("as measured now; gates are left out: they do not take the place of attention")
    print("route: how its pattern was computed; dense: with the whole mask, flat: in one softmax, union: by key sets")


def show_check(blocks: str, device: str) -> int:
    place = torch.empty(0, device=device).device
    found = answers.answers(place, blocks)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "as it is here"
    print(f"{place} ({name}), torch {torch.__version__}, beside the CPU in float64")
    for dtype, why in answers.trusted(place).items():
        print(f"kernel for several key sets in {short(dtype)}: {f'NOT used: {why}' if why else 'trusted'}")
    wrong = count = 0
    for answer in found:
        what = f"{answer.block}{answer.causal * ' causal'}"
        verdict = "right" if answer.right else f"WRONG {answer.said}".rstrip()
        print(f"{what:<32}{short(answer.dtype):<9} {answer.forward:9.2g} {answer.backward:9.2g}  {verdict}", flush=True)
        wrong, count = wrong + (not answer.right), count + 1
    print(f"{wrong} of {count} wrong; numbers: errors of output and gradients, as shares of what rounding may do")
    return int(wrong > 0)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def options_of(block: str) -> str:
    """The block's own options with their defaults."""
    shared = parameters(Mixer)
    own = {name: p for name, p in parameters(block_class(block)).items() if name not in shared}
    return ", ".join(f"{name}={p.default!r}" for name, p in own.items()) or "none of its own"


def table() -> str:
    """The blocks as a Markdown table."""
    lines = ["| block | what it does | paper | cost | computed | kind | causal |", "|---|---|---|---|---|---|---|"]
    for name in list_blocks():
        entry = describe(name)
        causal = "yes" if entry.causal else "no"
        paper = f"[{entry.source}]({entry.url})"
        what = (entry.title.partition(": ")[2] or entry.title).rstrip(".")
        lines.append(f"| `{name}` | {what} | {paper} | {entry.cost} | {entry.computed} × | {entry.kind} | {causal} |")
    return "\n".join(lines)


def renew(page: Path) -> None:
    """Writes the table between the two marks of ``page``. Raises ValueError if the page has no marks."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"page={page}: has no {BEGIN} … {END}")
    new = f"{BEGIN}\n{table()}\n{END}"
    page.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: new, text, flags=re.DOTALL), encoding="utf-8")


def columns(rows: list[tuple[str, ...]], texts: int = 1) -> None:
    """Prints rows aligned: the first ``texts`` columns to the left, the others, which are numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [f"{cell:{'<' if i < texts else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def digits(number: float) -> str:
    """At least three of them."""
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"


def setting(grid: Grid, dim: int, device: str) -> str:
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if device == "cpu" else ""
    return f"{grid.height}×{grid.width} positions, {dim} channels, {device}{threads}"


def created(make, block: str, dim: int, options: list[tuple], **more):
    """A block or layer; ValueError for an option it does not have."""
    try:
        return make(block, dim, **dict(options), **more)
    except TypeError as error:
        raise ValueError(f"--set: {error}") from error


# What is typed, and what it must be


def size(text: str) -> Grid:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be HEIGHTxWIDTH, both ≥ 1, as in 12x16")
    return Grid(*map(int, text.split("x")))


def query(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be Y,X, both counted from 0, as in 5,7")
    return tuple(map(int, text.split(",")))


def option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE, as in causal=true")
    try:
        return name, ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, SyntaxError):  # a name, such as mode=sum
        return name, value


def device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not there: {str(error).splitlines()[0]}") from error
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse(argv: list[str] | None) -> dict:
    """Arguments of a command, and ``call``, the function that takes them."""
    parser = Parser(prog="python -m vision_attn", description="The blocks of the zoo.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, call, help):
        made = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        made.set_defaults(call=call)
        return made

    def sized(made, default, dim, otherwise="64x64"):
        help = f"of the grid (default: {otherwise})"
        made.add_argument("--size", type=size, default=default, metavar="HEIGHTxWIDTH", help=help)
        made.add_argument("--dim", type=int, default=dim, help=f"channels (default: {dim})")

    def optional(made, help="an option of the block, as in causal=true; may be repeated"):
        made.add_argument(
            "--set", dest="options", type=option, action="append", default=[], metavar="NAME=VALUE", help=help
        )

    def timed(made, seconds):
        made.add_argument("--device", type=device, default="cpu", help="to measure on (default: cpu)")
        made.add_argument("--seconds", type=float, default=seconds, help=f"for further repeats (default: {seconds:g})")

    made = command("list", show_list, "names, kinds, costs and papers")
    made.add_argument("blocks", nargs="?", default="*", help="wildcard")
    made = command("show", show_looks, "what a pixel looks at; of a gate, its weight of every position")
    made.add_argument("block")
    optional(made)
    sized(made, None, 64, "12x16; of an image's proportions, 32 along its longer side")
    made.add_argument("--query", type=query, metavar="Y,X", help="the pixel (default: the middle)")
    made.add_argument("--png", type=Path, metavar="FILE", help="draw a picture instead")
    help = "an image file: what a block that chooses by content chooses in it, and any other's weights for it"
    made.add_argument("--image", type=Path, metavar="FILE", help=help)
    made.add_argument("--seed", type=int, default=0, help="of weights and image, where they matter")
    made = command("cost", show_cost, "operations, parameters, memory and time beside dense attention")
    made.add_argument("block")
    optional(made)
    sized(made, Grid(64, 64), 256)
    timed(made, 1.0)
    made = command("recommend", show_recommended, "time and memory of all mixers beside dense attention")
    made.add_argument("--blocks", nargs="+", default=["*"], help="names or wildcards of those to compare")
    optional(made, "an option of each of them, as in kernel_size=5; what lacks it is left out; may be repeated")
    made.add_argument("--causal", action="store_true", help="in raster order")
    made.add_argument("--batch", type=int, default=1, help="images (default: 1)")
    types = "float32", "bfloat16", "float16", "float64"
    made.add_argument("--dtype", choices=types, default="float32", help="of weights and input (default: float32)")
    sized(made, Grid(64, 64), 256)
    timed(made, 10.0)
    made = command("check", show_check, "whether a device gives right answers, block by block")
    made.add_argument("blocks", nargs="?", default="*", help="wildcard")
    made.add_argument("--device", type=device, default="cuda", help="to try (default: cuda)")
    made = command("readme", renew, "renew the table of blocks in a Markdown page")
    made.add_argument("page", type=Path)
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse(argv)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            code = arguments.pop("call")(**arguments) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not re.search("allocate|out of memory", str(error)):
            raise
        print("error: not enough memory for this size", file=sys.stderr)
        return 2
    for message in dict.fromkeys(str(warning.message) for warning in told):
        print(f"note: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
