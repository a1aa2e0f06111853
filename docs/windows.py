"""Draw docs/windows.png: how a neuron visits the windows of a map. Run ``python docs/windows.py``."""

from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from lightning_msnn.functional import side

COLOURS = ["#3b6fb6", "#d9822b", "#3f9b5f", "#a4508b"]
SIZE = 8
PANELS = [
    ("non_dilated", "non-dilated: a partition into quarters"),
    ("dilated", "dilated: enlarged quarters that overlap"),
    ("grid", "grid: every second row and column"),
]


def corners(kind: str) -> list[tuple[int, int]]:
    """Top-left pixel of each window."""
    far = SIZE - side(kind, SIZE)
    return [(0, 0), (0, far), (far, 0), (far, far)]


figure = Figure(figsize=(10.5, 4.7), layout="constrained")
axes = figure.subplots(1, 3)
for panel, (kind, title) in zip(axes, PANELS, strict=True):
    for y in range(SIZE):
        for x in range(SIZE):
            panel.add_patch(Rectangle((x, y), 1, 1, facecolor="none", edgecolor="#cccccc", lw=0.6))
    s = side(kind, SIZE)
    if kind == "grid":
        spots = []
        for k, (py, px) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            for y in range(py, SIZE, 2):
                for x in range(px, SIZE, 2):
                    panel.add_patch(Rectangle((x, y), 1, 1, facecolor=COLOURS[k], alpha=0.55, edgecolor="white"))
                    panel.text(x + 0.5, y + 0.5, str(k + 1), ha="center", va="center", fontsize=9)
            spots.append((2.5 + px, 2.5 + py))
    else:
        spots = []
        for k, (y, x) in enumerate(corners(kind)):
            inset = 0.07 * k if kind == "dilated" else 0.06
            panel.add_patch(
                Rectangle(
                    (x + inset, y + inset), s - 2 * inset, s - 2 * inset,
                    facecolor=COLOURS[k], alpha=0.16 if kind == "dilated" else 0.35, edgecolor=COLOURS[k], lw=2,
                )
            )  # fmt: skip
            spot = (1.2 if x == 0 else SIZE - 1.2, 1.2 if y == 0 else SIZE - 1.2)
            spots.append(spot)
            panel.text(*spot, str(k + 1), ha="center", va="center", fontsize=17, color=COLOURS[k], weight="bold")
    for a, b in pairwise(spots):
        panel.add_patch(
            FancyArrowPatch(
                a, b, arrowstyle="-|>", mutation_scale=13, lw=1.6, color="black",
                shrinkA=5 if kind == "grid" else 13, shrinkB=5 if kind == "grid" else 13,
            )
        )  # fmt: skip
    panel.set_title(title, fontsize=10.5)
    panel.set_xlim(-0.1, SIZE + 0.1)
    panel.set_ylim(SIZE + 0.1, -0.1)
    panel.set_aspect("equal")
    panel.axis("off")
figure.supxlabel(
    "One neuron, one time step: it visits windows 1, 2, 3, 4 in turn, and its membrane takes along what it saw.\n"
    r"layer 1: $u^1_k = \tau\,u^1_{k-1} + I^1_k$" "          "
    r"layer 2: $u^2_k = \tau\,\Omega(u^1_{k-1},\,u^2_{k-1}) + I^2_k$" "          "
    r"$\Omega(a, b) = 2\,\sin(\pi\theta\,a\,\cos(\pi\theta\,b))$",
    fontsize=11,
)  # fmt: skip
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
