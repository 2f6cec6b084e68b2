"""Draws docs/assets/frontier-smollm2-135m.png, which the README shows: ``python docs/draw_frontier.py``."""

from pathlib import Path

from swan.evaluation.figures import save

from results.quality import frontier_figure

figure = frontier_figure("smollm2-135m", title="SmolLM2-135M, 16k tokens")
save(figure, Path(__file__).with_name("assets") / "frontier-smollm2-135m.png")
