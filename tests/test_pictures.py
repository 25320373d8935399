"""Descriptions hold the numbers of the results; both renderers show all of them."""

import html
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import D_VOCAB, N_CTX
from hostile import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.cbook import is_math_text
from matplotlib.colors import to_hex
from saes import HOOK_NAMES, random_sae

from sae_lens_multilayer import evaluate, grid
from sae_lens_multilayer.analysis import (
    Comparison,
    LayerDistributions,
    Redundancy,
    TransferMatrix,
    active_layers,
    decoder_similarity,
    layer_distributions,
    prompt_acts,
    redundancy,
    residual_stream,
    token_classes,
    token_similarity,
    variances,
)
from sae_lens_multilayer.analysis.transfer import COMPARED
from sae_lens_multilayer.pictures import (
    Picture,
    describe_sweep,
    draw,
    draw_interactive,
    pictures_of,
    save_figure,
)
from sae_lens_multilayer.pictures.description import (
    Axis,
    Heatmap,
    Panel,
    Series,
    picture_of,
)


@pytest.fixture
def tokens():
    return torch.randint(1, D_VOCAB, (5, N_CTX))


# What both renderers show.


def check_both_show(picture: Picture) -> None:
    figure = draw(picture)
    assert unwrapped(in_matplotlib(figure.get_suptitle())) == unwrapped(
        literal(picture.title)
    )
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    plain = [axes for axes in figure.axes if axes not in bars]
    heatmaps = [panel.heatmap for panel in picture.panels if panel.heatmap]
    assert [in_matplotlib(axes.get_ylabel()) for axes in bars] == [
        literal(heatmap.label) for heatmap in heatmaps
    ]
    legends = [entry for axes in plain for entry in legend_of(axes)]
    interactive = draw_interactive(picture)
    for axes, plotly, panel in zip(plain, interactive, picture.panels, strict=True):
        check_axis(axes.get_xlabel(), plotly.layout.xaxis, panel.x)
        check_axis(axes.get_ylabel(), plotly.layout.yaxis, panel.y)
        traces: list[Any] = list(plotly.data)
        if panel.heatmap is not None:
            check_heatmap(axes, traces.pop(0), panel.heatmap)
        for series, trace in zip(panel.series, traces, strict=True):
            assert series.label == "" or literal(series.label) in legends
            assert in_plotly(trace.name) == literal(series.label)
            y = np.asarray(series.y, float)
            if series.kind != "band":
                assert trace.y == pytest.approx(y, nan_ok=True)
            if series.kind == "intervals":
                assert trace.error_y.array + y == pytest.approx(np.asarray(series.top))
        if panel.vertical_line is not None:
            assert literal(panel.vertical_line[1]) in legends
            (line,) = plotly.layout.shapes
            assert in_plotly(line.name) == literal(panel.vertical_line[1])


def check_heatmap(axes, plotly, heatmap: Heatmap) -> None:
    image = axes.get_images()[0].get_array().filled(np.nan)
    assert image == pytest.approx(heatmap.values, nan_ok=True)
    assert plotly.z == pytest.approx(heatmap.values, nan_ok=True)
    assert in_plotly(plotly.colorbar.title.text) == literal(heatmap.label)
    assert plotly.hovertemplate.count("%{") == 3


def check_axis(label: str, plotly, axis: Axis) -> None:
    assert in_matplotlib(label) == literal(axis.label)
    assert in_plotly(plotly.title.text) == literal(axis.label)
    if axis.names is not None:
        names = [in_plotly(name) for name in plotly.categoryarray]
        assert names == [literal(name) for name in axis.names]
        assert len(set(plotly.categoryarray)) == len(names)


def legend_of(axes) -> list[str]:
    legend = axes.get_legend()
    texts = [] if legend is None else legend.get_texts()
    return [in_matplotlib(text.get_text()) for text in texts]


def in_matplotlib(text: str) -> str:
    """What a reader sees of a text of matplotlib."""
    assert not is_math_text(text)
    return text.replace(r"\$", "$").removeprefix("\u200b")


def in_plotly(text: str) -> str:
    """What a reader sees of a text of plotly, by its list of tags and entities."""
    assert set(re.findall(r"<[^>]*>", text)) <= {"<br>"}
    assert "$" not in text
    assert "%{" not in text
    return html.unescape(text.replace("<br>", "\n")).rstrip("\u200b")


def literal(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def unwrapped(text: str) -> str:
    return "".join(text.split())


texts = st.sampled_from(HOSTILE) | st.text(
    st.sampled_from("ab<>&$_%{\\\n"), min_size=1, max_size=9
)
numbers = st.floats(-9, 9)


@st.composite
def plain_panels(draw_value) -> Panel:
    n = draw_value(st.integers(1, 5))
    values = st.lists(numbers, min_size=n, max_size=n)
    kinds = st.sampled_from(["line", "points", "bars", "band"])
    labels = draw_value(st.lists(texts, max_size=3, unique=True))
    series = [
        Series(label, range(n), draw_value(values), draw_value(kinds), [9.0] * n)
        for label in labels
    ]
    names = draw_value(st.none() | st.lists(texts, min_size=n, max_size=n))
    x = Axis(draw_value(texts), names)
    line = draw_value(st.none() | st.tuples(numbers, texts))
    return Panel(x, Axis(draw_value(texts)), series, None, line)


@settings(max_examples=10)
@given(st.lists(plain_panels(), min_size=1, max_size=3), texts)
def test_both_renderers_show_all_of_any_description(panels, title):
    check_both_show(Picture(title, panels, title))


def test_hostile_texts_are_shown_as_they_are(tmp_path):
    n, text = len(HOSTILE), "".join(HOSTILE)
    series = [Series(text, range(n), range(n)) for text in HOSTILE]
    check_both_show(Picture(text, [Panel(Axis(text, HOSTILE), Axis(text), series)]))
    small = Picture(text, [Panel(Axis("x"), Axis("y"), [Series(text, [0], [0])])])
    save_figure(draw(small), tmp_path / "picture.png")


@settings(max_examples=5)
@given(texts, st.lists(texts, min_size=3, max_size=3), st.sampled_from([1.0, None]))
def test_both_renderers_show_a_heatmap_with_repeated_names(label, names, top):
    values = np.array([[0.1, np.nan, 0.3], [1.5, 0.2, 0.0]])
    dots = Series("mean", range(3), [0.5, np.nan, 1.0], kind="points")
    panel = Panel(
        Axis(label, names), Axis("y", ["a", "a"]), [dots], Heatmap(values, "p", top)
    )
    check_both_show(Picture("title", [panel]))


def test_both_renderers_use_the_same_colours():
    series = [Series(f"{i}", [0, 1], [0, 1], colour=i) for i in (0, 3)]
    picture = Picture("", [Panel(Axis("x"), Axis("y"), series)])
    drawn = [to_hex(line.get_color()) for line in draw(picture).axes[0].lines]
    traces = draw_interactive(picture)[0].to_dict()["data"]
    assert drawn == [trace["line"]["color"].lower() for trace in traces]


def test_a_figure_is_saved_as_an_image(tmp_path):
    series = Series("$_x^$", [0], [1])
    picture = Picture("", [Panel(Axis("$_x^$"), Axis("y"), [series])], "$_x^$")
    path = save_figure(draw(picture), tmp_path / "new" / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_legends_cover_nothing(model, tokens):
    sae = random_sae()
    dists = layer_distributions(sae, model, tokens)
    for figure in (
        draw(active_layers(sae, model, tokens)),
        draw(variances(sae, model, tokens)),
        draw(redundancy(sae.W_dec.detach(), dists, min_cos_sim=0.0)),
        draw(residual_stream(model, HOOK_NAMES, tokens)),
    ):
        figure.draw_without_rendering()
        legends = [(axes, axes.get_legend()) for axes in figure.axes]
        assert any(legend for _, legend in legends)
        for axes, legend in legends:
            if legend is None:
                continue
            box = legend.get_window_extent()
            assert not axes.xaxis.label.get_window_extent().overlaps(box)
            assert not axes.bbox.overlaps(box)
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_panels_of_a_row_with_the_same_series_share_a_legend():
    multi, single = torch.rand(2, 2, len(COMPARED)).double()
    figure = draw(Comparison(HOOK_NAMES, multi, single))
    assert [bool(axes.get_legend()) for axes in figure.axes] == [True, False, False]


# Descriptions of results.


def described(result, **context) -> Picture:
    picture = picture_of(result, **context)
    check_both_show(picture)
    return picture


def series_of(panel: Panel) -> dict[str, list[float]]:
    return {series.label: list(map(float, series.y)) for series in panel.series}


def values_of(picture: Picture) -> np.ndarray:
    heatmap = picture.panels[0].heatmap
    assert heatmap is not None
    return heatmap.values


def test_latents_are_sorted_by_mean_layer():
    # Latent 1 is never active; 2 has the lowest mean layer.
    counts = torch.tensor([[1, 0, 4, 1], [3, 0, 0, 1]])
    dists = LayerDistributions(HOOK_NAMES, 9, counts, 2 * counts.double())
    picture = described(dists)
    assert values_of(picture).tolist() == [[1, 0.5, 0.25], [0, 0.5, 0.75]]
    frequency = picture.panels[1].heatmap
    assert frequency is not None
    assert frequency.values * 9 == pytest.approx(counts[:, [2, 3, 0]].numpy())
    assert [panel.x.names for panel in picture.panels] == [["2", "3", "0"]] * 2
    assert "9 tokens" in picture.title
    chosen = described(dists, latents=torch.tensor([0, 2]))
    assert values_of(chosen).tolist() == [[0.25, 1], [0.75, 0]]
    with pytest.raises(ValueError, match="a latent that was active; there is none"):
        picture_of(LayerDistributions(HOOK_NAMES, 9, 0 * counts, 0 * counts.double()))


def test_latents_with_two_modes_are_at_the_end():
    # By mean layer, latent 1 (at both ends) would be between latents 0 and 2.
    counts = torch.tensor([[40, 30, 0], [0, 0, 0], [0, 30, 40]])
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    dists = LayerDistributions(names, 90, counts, counts.double())
    picture = described(dists)
    assert picture.panels[0].x.names == ["0", "2", "1 (two modes)"]
    assert picture.panels[1].vertical_line == (1.5, "right of it: two modes")
    assert "Latents with two modes: 1" in picture.caption
    chosen = described(dists, latents=torch.tensor([1, 0]))
    assert chosen.panels[0].x.names == ["1 (two modes)", "0"]
    assert chosen.panels[0].vertical_line is None


def test_of_many_latents_some_are_drawn():
    counts = torch.ones(2, 5000, dtype=torch.long)
    picture = picture_of(LayerDistributions(HOOK_NAMES, 9, counts, counts.double()))
    assert values_of(picture).shape == (2, 4096)
    assert picture.panels[0].x.label.startswith("5,000 active latents")
    assert "4,096 of all" in picture.caption


def test_one_latent_on_a_prompt(model, tokens):
    acts = prompt_acts(random_sae(), model, tokens[:1])
    latent = int(acts.latents[0])
    picture = described(acts, latent=latent, text_of="${}\n".format)
    assert values_of(picture) == pytest.approx(acts.of_latent(latent).numpy())
    ticks = [label.get_text() for label in draw(picture).axes[0].get_xticklabels()]
    assert ticks == [rf"\${i}\n" for i in acts.token_ids.tolist()]
    assert draw(acts).get_suptitle().startswith("Latent ")


def test_variances_by_tokens_seen(model, tokens):
    result = variances(random_sae(), model, tokens)
    left, right = map(series_of, described(result).panels)
    assert left["Var(L): all"] == result.history.var_l.tolist()
    ratio = right["at a token / of a latent"]
    assert ratio == pytest.approx(result.history.token_ratio.tolist(), nan_ok=True)


def test_active_layers_are_counted_at_whole_numbers(model, tokens):
    active = active_layers(random_sae(), model, tokens)
    (panel,) = described(active).panels
    n_active = int((active.n_active_tokens > 0).sum())
    assert [sum(y) for y in series_of(panel).values()] == [n_active, n_active]
    assert panel.x.ticks == range(1, 3)


def test_decoder_similarity_counts_every_latent():
    similarity = decoder_similarity(random_sae().W_dec)
    similarity = replace(similarity, cos_sim=similarity.cos_sim.bfloat16())
    similarity.cos_sim[0] = 1.0 + 2**-7  # rounding may lead above 1
    (panel,) = described(similarity).panels
    assert sum(series_of(panel)[""]) == 64
    assert panel.vertical_line == (similarity.mean, f"mean: {similarity.mean:.3f}")


def test_residual_stream(model, tokens):
    residual = residual_stream(model, HOOK_NAMES, tokens)
    picture = described(residual)
    assert values_of(picture) == pytest.approx(residual.cos_sim.numpy())
    assert series_of(picture.panels[1])["mean"] == residual.norm.tolist()
    band = picture.panels[1].series[0]
    half = (np.asarray(band.top) - np.asarray(band.y)) / 2
    assert half == pytest.approx(residual.norm_var.sqrt().numpy())


@pytest.mark.parametrize("n_pairs", [0, 4])
def test_redundancy(n_pairs):
    result = Redundancy(
        0.7,
        0.1,
        10,
        torch.zeros(n_pairs, 2, dtype=torch.long),
        torch.ones(n_pairs),
        torch.tensor([0.0, 0.5, 1.0, 1.0])[:n_pairs],
        torch.tensor([0.0, 1.0]),
    )
    picture = described(result)
    labels = [series.label for series in picture.panels[0].series]
    assert labels[-1] == "2 random pairs: 50.0% disjoint"
    assert labels[:-1] == ["near-duplicates: 25.0% disjoint"][: n_pairs // 4]
    heights = series_of(picture.panels[0])[labels[-1]]
    assert (heights[0], heights[-1]) == (0.5, 0.5)
    assert f"{n_pairs} near-duplicates" in picture.caption


@pytest.fixture
def classes(model, tokens):
    sae = random_sae()
    counts = layer_distributions(sae, model, tokens).counts.sum(0)
    return token_classes(sae, model, tokens, [int(counts.argmax())])


@pytest.mark.parametrize("kind", ["position", "frequency", "token"])
def test_token_classes(classes, kind):
    latent = int(classes.latents)
    pictures = classes.pictures(text_of="<w{}>".format, n_most=3)
    picture = described(pictures[f"{latent}_{kind}"])
    table = classes.by(kind, latent)
    table = table.head(3) if kind == "token" else table
    shown = values_of(picture)
    (dots,) = series_of(picture.panels[0]).values()
    if kind == "position":
        assert len(dots) == N_CTX
        assert np.isnan(np.delete(shown, table.index, axis=1)).all()
        shown, dots = shown[:, table.index], [dots[i] for i in table.index]
    assert shown == pytest.approx(table.filter(like="p_").to_numpy().T)
    assert dots == pytest.approx(table.mean_layer.tolist())
    if kind == "token":
        assert picture.panels[0].x.names == [f"<w{i}>" for i in table.index]


def test_a_result_of_many_pictures_gives_each_a_name(classes):
    latent = int(classes.latents)
    pictures = pictures_of({"classes": classes, "other": classes}, text_of=str)
    kinds = ("position", "frequency", "token")
    assert list(pictures)[:3] == [f"classes_{latent}_{kind}" for kind in kinds]
    assert len(pictures) == 6


def test_one_picture_is_drawn(classes):
    with pytest.raises(ValueError, match=r"a TokenClasses has 3: \[.*_position"):
        draw(classes)
    similarity = token_similarity(torch.eye(2), torch.eye(2), 1)
    with pytest.raises(ValueError, match=r"a TokenSimilarity has 0"):
        draw_interactive(similarity)


@pytest.mark.parametrize("n_layers", [2, 30])
def test_transfer_matrix(n_layers):
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    fvu = torch.rand(n_layers, n_layers).double()
    picture = described(TransferMatrix(names, names, 10, fvu, fvu[0]))
    assert values_of(picture) == pytest.approx(torch.cat([fvu, fvu[:1]]).numpy())
    figure = draw(picture)
    assert len(figure.axes[0].texts) == (6 if n_layers == 2 else 0)
    figure.draw_without_rendering()
    title, bar_label = figure.texts[0], figure.axes[1].yaxis.label
    for text in (title, bar_label):
        box, whole = text.get_window_extent(), figure.bbox
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1


def test_comparison():
    multi, single = torch.rand(2, 2, len(COMPARED)).double()
    picture = described(Comparison(HOOK_NAMES, multi, single))
    lines = series_of(picture.panels[1])
    assert lines["one SAE"] == multi[:, COMPARED.index("delta_ce")].tolist()
    assert len(picture.panels) == 3


def test_fvu_by_layer(model, tokens):
    metrics = evaluate(random_sae(), model, tokens)
    (panel,) = described(metrics).panels
    assert series_of(panel)["around the mean vector (fvu)"] == metrics.fvu.tolist()


# Descriptions of sweeps.


def table(points, **columns) -> pd.DataFrame:
    rows = [
        {"status": "done", "n_tokens": 64, "fvu": 0.5 / (i + 1), "delta_ce": 0.1, **p}
        for i, p in enumerate(points)
    ]
    return pd.DataFrame(rows).assign(**columns)


def sweep_of(*args) -> Picture:
    picture = describe_sweep(*args)
    check_both_show(picture)
    return picture


def labels_of(panel: Panel) -> list[str]:
    return [series.label for series in panel.series]


def test_one_setting_is_one_row_without_legend():
    picture = sweep_of(table(grid(k=[32, 16])), ["k"])

    assert [panel.y.label for panel in picture.panels] == [
        "fraction of variance unexplained",
        "ΔCE (nats)",
    ]
    (line,) = picture.panels[0].series
    assert (list(line.x), list(line.y)) == ([16, 32], [0.25, 0.5])
    assert line.label == ""


def test_two_settings_are_two_rows_with_a_line_for_each_value_of_the_other():
    points = grid(expansion_factor=[4, 8], k=[16, 32])
    picture = sweep_of(table(points, token_ratio=0.2), ["expansion_factor", "k"])

    assert (len(picture.panels), picture.n_columns) == (6, 3)
    assert labels_of(picture.panels[0]) == ["k 16", "k 32"]
    assert labels_of(picture.panels[3]) == ["R 4", "R 8"]
    line = picture.panels[0].series[1]
    assert (list(line.x), list(line.y)) == ([4, 8], [0.25, 0.125])
    assert picture.panels[3].x.label == "k"
    shown = [bool(axes.get_legend()) for axes in draw(picture).axes]
    assert shown == [True, False, False, True, False, False]


def test_more_settings_are_told_apart_by_colour_and_style():
    points = grid(k=[16, 32], layers=[None, [0, 1]], model_name=["a/b", "c"])
    picture = sweep_of(table(points), ["k", "layers", "model_name"])

    assert labels_of(picture.panels[0]) == [
        "all layers, b",
        "all layers, c",
        "layers 0, 1, b",
        "layers 0, 1, c",
    ]
    lines = draw(picture).axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 4


def test_points_without_a_number_stand_side_by_side():
    picture = sweep_of(table(grid(layers=[None, [0]])), ["layers"])

    assert picture.panels[0].x.names == ["0", "1"]
    assert series_of(picture.panels[0]) == {"": [0.5, 0.25]}


def test_unfinished_points_are_counted_and_not_drawn():
    points = table(grid(k=[1, 2, 4]))
    points.loc[1, "status"] = "failed"
    picture = sweep_of(points, ["k"])

    assert list(picture.panels[0].series[0].x) == [1, 4]
    assert "1 of 3 points are not done" in picture.caption
    with pytest.raises(ValueError, match="must be a point that is done"):
        describe_sweep(points.assign(status="failed"), ["k"])
