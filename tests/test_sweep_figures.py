"""What is drawn of a table: which panels, lines and labels."""

from typing import Any

import pandas as pd
import pytest

from sae_lens_multilayer import grid
from sae_lens_multilayer.pictures.sweep_figures import plot_costs, plot_sweep


def table(points, **columns) -> pd.DataFrame:
    rows = [
        {"status": "done", "n_tokens": 64, "fvu": 0.5 / (i + 1), "delta_ce": 0.1, **p}
        for i, p in enumerate(points)
    ]
    return pd.DataFrame(rows).assign(**columns)


def line_of(axes: Any, i: int = 0) -> tuple[list[float], list[float]]:
    line = axes.lines[i]
    return list(line.get_xdata()), list(line.get_ydata())


def heights(axes: Any) -> list[float]:
    return [bar.get_height() for bar in axes.patches]


def legend(figure, row: int = 0) -> list[str]:
    n_columns = len(figure.axes) // n_rows(figure)
    found = figure.axes[(row + 1) * n_columns - 1].get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def n_rows(figure) -> int:
    return len({axes.get_subplotspec().rowspan.start for axes in figure.axes})


def test_one_setting_is_one_row_without_legend():
    points = grid(k=[32, 16])
    figure = plot_sweep(table(points), ["k"])

    assert [axes.get_ylabel() for axes in figure.axes] == [
        "fraction of variance unexplained",
        "ΔCE (nats)",
    ]
    assert len(figure.axes[0].lines) == 1
    assert line_of(figure.axes[0]) == ([16, 32], [0.25, 0.5])
    assert legend(figure) == []


def test_two_settings_are_two_rows_with_a_line_for_each_value_of_the_other():
    points = grid(expansion_factor=[4, 8], k=[16, 32])
    figure = plot_sweep(table(points, token_ratio=0.2), ["expansion_factor", "k"])

    assert len(figure.axes) == 6
    assert legend(figure, 0) == ["k 16", "k 32"]
    assert legend(figure, 1) == ["R 4", "R 8"]
    assert line_of(figure.axes[0], 1) == ([4, 8], [0.25, 0.125])
    assert figure.axes[3].get_xlabel() == "k"


def test_more_settings_are_told_apart_by_colour_and_style():
    points = grid(k=[16, 32], layers=[None, [0, 1]], model_name=["a/b", "c"])
    figure = plot_sweep(table(points), ["k", "layers", "model_name"])

    assert legend(figure) == [
        "all layers, b",
        "all layers, c",
        "layers 0, 1, b",
        "layers 0, 1, c",
    ]
    looks = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines]
    assert len(set(looks)) == 4


def test_points_without_a_number_stand_side_by_side():
    figure = plot_sweep(table(grid(layers=[None, [0]])), ["layers"])

    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["0", "1"]


def test_points_that_are_not_done_are_left_out_and_counted():
    points = table(grid(k=[1, 2, 4]))
    points.loc[1, "status"] = "failed"
    figure = plot_sweep(points, ["k"])

    assert line_of(figure.axes[0])[0] == [1, 4]
    assert "1 of 3 points are not done" in figure.get_suptitle()
    with pytest.raises(ValueError, match="must be a point that is done"):
        plot_sweep(points.assign(status="failed"), ["k"])


def test_costs_are_those_of_both():
    costs = pd.DataFrame(
        {
            "training_seconds": [5.0, 3, 4, 7],
            "training_peak_memory_mib": [9, 7, 8, 8.0],
        },
        index=["multi_layer", "layer_0", "layer_1", "single_layers"],
    )
    left, right = plot_costs(costs).axes

    assert heights(left) == [5, 7]
    assert heights(right) == [9, 8]
    labels = [label.get_text() for label in left.get_xticklabels()]
    assert labels == ["one SAE", "2 single-layer SAEs"]


def test_short_times_are_not_drawn_as_zero():
    index = ["multi_layer", "single_layers", "layer_0"]
    costs = pd.DataFrame(
        {
            "training_seconds": [0.134, 1234.6, 0.2],
            "training_peak_memory_mib": [1559.0, 10.0, 10.0],
        },
        index=index,
    )
    left, right = plot_costs(costs).axes
    assert [text.get_text() for text in left.texts] == ["0.13", "1,235"]
    assert [text.get_text() for text in right.texts] == ["1,559", "10"]
