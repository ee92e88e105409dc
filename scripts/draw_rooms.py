"""Draw the rooms of lora_one as docs/rooms.svg, from its import statements.

python scripts/draw_rooms.py            writes docs/rooms.svg, the picture in docs/design.md

A room is a package or a file directly in lora_one/. It is drawn above every room that it imports. An arrow that is
implied by a chain of other arrows is left out (transitive reduction).
"""

import ast
import sys
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_one"
WIDTH, HEIGHT, GAP, RISE = 118, 34, 14, 64  # pixels: size of a box, between boxes, between levels
Graph = dict[str, set[str]]  # room -> rooms that it imports


def room_of(file: Path) -> str:
    """Return the room that a file belongs to."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(file: Path) -> set[str]:
    """Return the rooms that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lora_one":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_one."):
            found.add(node.module.split(".")[1])
    return found


def graph_of_rooms() -> Graph:
    """Return the rooms that each room imports, without lora_one/__init__.py, which only exports public names."""
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]
    graph: Graph = {room_of(file): set() for file in files}
    for file in files:
        graph[room_of(file)] |= (imported_rooms(file) & graph.keys()) - {room_of(file)}
    return graph


def levels_of(graph: Graph) -> dict[str, int]:
    """Return each room's level: 0 without imports, else one above the highest room it imports.

    Raises graphlib.CycleError: rooms import each other in a circle.
    """
    levels: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        levels[room] = 1 + max((levels[below] for below in graph[room]), default=-1)
    return levels


def reduced(graph: Graph) -> Graph:
    """Return the transitive reduction: the graph without the arrows that follow from a longer path."""

    def reachable(room: str) -> set[str]:
        return set().union(*({below} | reachable(below) for below in graph[room]))

    return {
        room: {below for below in direct if not any(below in reachable(other) for other in direct - {below})}
        for room, direct in graph.items()
    }


def drawing(graph: Graph) -> str:
    """Return the SVG: one row of boxes per level, the lowest level at the bottom."""
    levels = levels_of(graph)
    rows = [sorted(room for room in graph if levels[room] == level) for level in range(max(levels.values()) + 1)]
    across = max(map(len, rows)) * (WIDTH + GAP) + GAP
    down = len(rows) * RISE + GAP
    place = {
        room: (across / 2 + (index - (len(row) - 1) / 2) * (WIDTH + GAP), down - RISE * (level + 1) + HEIGHT)
        for level, row in enumerate(rows)
        for index, room in enumerate(row)
    }
    arrows = [
        f'<line x1="{place[room][0]:.0f}" y1="{place[room][1] + HEIGHT / 2:.0f}" '
        f'x2="{place[below][0]:.0f}" y2="{place[below][1] - HEIGHT / 2:.0f}"/>'
        for room, direct in sorted(reduced(graph).items())
        for below in sorted(direct)
    ]
    boxes = [
        f'<rect x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}">{escape(room)}</text>'
        for room, (x, y) in place.items()
    ]
    style = (
        "line{stroke:#8a94a6;stroke-width:1.2}rect{fill:#eef3fb;stroke:#3b5b92}"
        "text{font:14px sans-serif;text-anchor:middle;fill:#1c2b46}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across:.0f} {down:.0f}">'
    return "\n".join([head, f"<style>{style}</style>", *arrows, *boxes, "</svg>", ""])


def main() -> int:
    (ROOT / "docs" / "rooms.svg").write_text(drawing(graph_of_rooms()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
