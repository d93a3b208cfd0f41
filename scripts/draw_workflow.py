"""Draws the ComfyUI example workflow as a picture: nodes in columns by depth, their settings and links.

    python scripts/draw_workflow.py       # writes docs/images/comfyui-workflow.png

It is a drawing made from the workflow's JSON, not a screenshot.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "python/dlms_engine/integrations/comfyui/example_workflow.json"
PICTURE = ROOT / "docs/images/comfyui-workflow.png"
WIDTH, LINE, GAP = 2.6, 0.24, 0.5  # of a box, of a line of text, between boxes
Box = tuple[float, float, float]  # left, top, height


def links(node: dict[str, Any]) -> dict[str, str]:
    """Input -> the node it comes from."""
    return {k: v[0] for k, v in node["inputs"].items() if isinstance(v, list)}


def depth(workflow: dict[str, Any], name: str) -> int:
    """Links on the longest way from a node without any."""
    return max(
        (depth(workflow, source) + 1 for source in links(workflow[name]).values()), default=0
    )


def place(workflow: dict[str, Any]) -> dict[str, Box]:
    """A box for each node: one column a depth, top to bottom."""
    tops: dict[int, float] = {}
    boxes: dict[str, Box] = {}
    for name, node in workflow.items():
        column = depth(workflow, name)
        height = LINE * (len(node["inputs"]) + 1.6)
        top = tops.get(column, 0.0)
        boxes[name] = (column * (WIDTH + 0.9), -top, height)
        tops[column] = top + height + GAP
    return boxes


def draw(workflow: dict[str, Any], target: Path) -> None:
    """Writes the picture."""
    boxes = place(workflow)
    wide = max(left for left, _, _ in boxes.values()) + WIDTH
    high = max(height - top for _, top, height in boxes.values())
    figure, axes = plt.subplots(figsize=(wide * 0.95, high * 0.95))
    for name, node in workflow.items():
        left, top, height = boxes[name]
        ours = node["class_type"].startswith("DLMS")
        colour = "#dbe9f6" if ours else "#f2f2f2"
        axes.add_patch(
            plt.Rectangle(
                (left, top - height), WIDTH, height, facecolor=colour, edgecolor="#444444"
            )
        )
        axes.text(left + 0.1, top - LINE, node["class_type"], weight="bold", size=9, va="center")
        for row, (key, value) in enumerate(node["inputs"].items()):
            y = top - LINE * (row + 2.2)
            shown = key if isinstance(value, list) else f"{key}: {value}"
            axes.text(left + 0.1, y, shown[:34], size=7.5, va="center")
            if isinstance(value, list):
                start, begin, _ = boxes[value[0]]
                axes.annotate(
                    "", (left, y), (start + WIDTH, begin - LINE),
                    arrowprops={"arrowstyle": "->", "color": "#777777", "lw": 0.8},
                )  # fmt: skip
    axes.set_xlim(-0.1, wide + 0.1)
    axes.set_ylim(-high - 0.1, 0.1)
    axes.axis("off")
    figure.savefig(target, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(WORKFLOW.read_text()), Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
