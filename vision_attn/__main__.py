"""``python -m vision_attn list`` prints the blocks; ``python -m vision_attn readme FILE`` renews a page's table."""

import argparse
import re
import sys
from pathlib import Path

from .zoo import describe, list_blocks

BEGIN, END = "<!-- blocks: begin -->", "<!-- blocks: end -->"


def table() -> str:
    """The blocks as a Markdown table."""
    lines = ["| block | what it does | paper | cost | kind | causal |", "|---|---|---|---|---|---|"]
    for name in list_blocks():
        entry = describe(name)
        causal = "yes" if entry.causal else "no"
        paper = f"[{entry.source}]({entry.url})"
        what = (entry.title.partition(": ")[2] or entry.title).rstrip(".")
        lines.append(f"| `{name}` | {what} | {paper} | {entry.cost} | {entry.kind} | {causal} |")
    return "\n".join(lines)


def renew(page: Path) -> None:
    """Writes the table between the two marks of ``page``. Raises ValueError if the page has no marks."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"page={page}: has no {BEGIN} … {END}")
    new = f"{BEGIN}\n{table()}\n{END}"
    page.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: new, text, flags=re.DOTALL), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vision_attn", description="The blocks of the zoo.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, papers and costs")
    commands.add_parser("readme", help="renew the table of blocks in a Markdown page").add_argument("page", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "readme":
        renew(arguments.page)
        return 0
    width = max(map(len, list_blocks()))
    for name in list_blocks():
        entry = describe(name)
        print(f"{name:{width}}  {entry.kind:5}  {entry.cost:24}  {entry.source}, {entry.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
