"""Draws TFLOP/s against length from a results file of `benchmarks.bench`.

python -m benchmarks.plot benchmarks/results/<name>.json [chart.png]
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections import defaultdict
from typing import Any

import matplotlib

Panel = tuple[int, bool]


def panels(results: list[dict[str, Any]]) -> dict[Panel, dict[str, dict[int, float]]]:
    """(head width, causal) -> arm -> query length -> TFLOP/s.

    Of the main cells, or of their backwards where there are no main cells.
    """
    sets = {result.get("set", "main") for result in results}
    chosen = "main" if "main" in sets else "backward"
    found: dict[Panel, dict[str, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for result in results:
        if result.get("set", "main") != chosen:
            continue
        cell = result["cell"]
        panel = found[cell["head_dim"], cell["is_causal"]]
        for name, entry in result["arms"].items():
            panel[name][cell["query_length"]] = entry["tflops"]
    return found


def draw(data: dict[str, Any], path: pathlib.Path) -> None:
    """Writes the chart: a row of panels for each mask, a column for each width."""
    matplotlib.use("Agg")
    from matplotlib import lines
    from matplotlib import pyplot as plt

    found = panels(data["results"])
    widths = sorted({width for width, _ in found})
    masks = sorted({is_causal for _, is_causal in found})
    figure, grid = plt.subplots(
        len(masks),
        len(widths),
        figsize=(1 + 4 * len(widths), 1 + 3 * len(masks)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    names = sorted({name for panel in found.values() for name in panel})
    for row, is_causal in zip(grid, masks, strict=True):
        for axes, width in zip(row, widths, strict=True):
            for index, name in enumerate(names):
                points = sorted(found[width, is_causal][name].items())
                style = "o-" if name.startswith("jax_flash") else ".--"
                lengths, tflops = [x for x, _ in points], [y for _, y in points]
                axes.plot(lengths, tflops, style, color=f"C{index}")
            title = f"width {width}" + (", causal" if is_causal else "")
            axes.set_title(title, fontsize=10)
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
    # After the last panel: setting one limit ends the automatic choice of the other.
    grid[0, 0].set_ylim(bottom=0)
    for axes in grid[-1]:
        axes.set_xlabel("length")
    handles = [
        lines.Line2D([], [], color=f"C{index}", label=name)
        for index, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names))
    figure.supylabel("TFLOP/s")
    versions = data["versions"]
    figure.suptitle(
        f"{data['device']}, jax {versions['jax']}, {data['date'][:10]},"
        f" commit {data['commit']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draws a results file.")
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("chart", type=pathlib.Path, nargs="?")
    arguments = parser.parse_args()
    chart = arguments.chart or arguments.results.with_suffix(".png")
    draw(json.loads(arguments.results.read_text()), chart)
    print(chart)


if __name__ == "__main__":
    main()
