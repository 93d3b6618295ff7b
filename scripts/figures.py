"""How the scripts write pictures: without a screen, beside first and then in place."""

from pathlib import Path

import matplotlib

from common import write_aside


matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402


def save_figure(figure: pyplot.Figure, path: str | Path) -> None:
    """Write a figure as a .png and forget it."""
    with write_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=150)
    pyplot.close(figure)
