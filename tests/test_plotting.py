"""The pictures hold the numbers of the results, with labels and colour bars."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_VOCAB, N_CTX
from saes import HOOK_NAMES, random_sae

from sae_lens_multilayer import evaluate
from sae_lens_multilayer.analysis import (
    Comparison,
    LayerDistributions,
    Redundancy,
    ResidualStream,
    TransferMatrix,
    active_layers,
    decoder_similarity,
    layer_distributions,
    prompt_acts,
    redundancy,
    residual_stream,
    token_classes,
    variances,
)
from sae_lens_multilayer.analysis.transfer import COMPARED
from sae_lens_multilayer.pictures import matplotlib_figures as plotting


@pytest.fixture
def tokens():
    return torch.randint(1, D_VOCAB, (5, N_CTX))


def image_of(axes) -> np.ndarray:
    return axes.get_images()[0].get_array().filled(np.nan)


def labels_of(figure) -> set[str]:
    return {a.get_xlabel() for a in figure.axes} | {a.get_ylabel() for a in figure.axes}


def lines_of(axes) -> dict[str, list[float]]:
    return {
        line.get_label(): [float(y) for y in line.get_ydata()]
        for line in axes.get_lines()
    }


def save(figure, tmp_path) -> None:
    path = plotting.save_figure(figure, tmp_path / "new" / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_latents_are_sorted_by_mean_layer(tmp_path):
    # Latent 1 is never active; 2 has the lowest mean layer.
    counts = torch.tensor([[1, 0, 4, 1], [3, 0, 0, 1]])
    dists = LayerDistributions(HOOK_NAMES, 9, counts, counts.double())
    figure = plotting.plot_layer_distributions(dists)
    assert image_of(figure.axes[0]).tolist() == [[1, 0.5, 0.25], [0, 0.5, 0.75]]
    assert {"P(layer | latent)", "layer"} <= labels_of(figure)
    assert "9 tokens" in figure.axes[0].get_title()
    save(figure, tmp_path)
    chosen = plotting.plot_layer_distributions(dists, torch.tensor([0, 2]))
    assert image_of(chosen.axes[0]).tolist() == [[0.25, 1], [0.75, 0]]
    with pytest.raises(ValueError, match="a latent that was active; there is none"):
        plotting.plot_layer_distributions(
            LayerDistributions(HOOK_NAMES, 9, 0 * counts, 0 * counts.double())
        )


def test_one_latent_on_a_prompt(model, tokens, tmp_path):
    sae = random_sae()
    acts = prompt_acts(sae, model, tokens[:1])
    latent = int(acts.latents[0])
    texts = [f"${i}\n" for i in range(N_CTX)]
    figure = plotting.plot_latent_on_prompt(acts, latent, texts)
    assert image_of(figure.axes[0]) == pytest.approx(acts.of_latent(latent).numpy())
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks[3] == r"\$3\n"
    save(figure, tmp_path)


def test_variances_by_tokens_seen(model, tokens, tmp_path):
    result = variances(random_sae(), model, tokens)
    figure = plotting.plot_variances(result)
    left, right = (lines_of(axes) for axes in figure.axes)
    assert left["Var(L): all"] == result.history.var_l.tolist()
    ratio = right["at a token / of a latent"]
    assert ratio == pytest.approx(result.history.token_ratio.tolist(), nan_ok=True)
    save(figure, tmp_path)


def test_histograms_count_latents(model, tokens, tmp_path):
    sae = random_sae()
    active = active_layers(sae, model, tokens)
    figure = plotting.plot_active_layers(active)
    bars: list[Any] = list(figure.axes[0].patches)
    n_active = int((active.n_active_tokens > 0).sum())
    assert sum(bar.get_height() for bar in bars) == 2 * n_active
    ticks = figure.axes[0].get_xticks()
    assert ticks == pytest.approx(np.round(ticks))
    save(figure, tmp_path)
    similarity = decoder_similarity(sae.W_dec)
    figure = plotting.plot_decoder_similarity(similarity)
    bars = list(figure.axes[0].patches)
    assert sum(bar.get_height() for bar in bars) == 64
    assert f"mean: {similarity.mean:.3f}" in lines_of(figure.axes[0])
    save(figure, tmp_path)


def test_legends_cover_nothing(model, tokens):
    sae = random_sae()
    W_dec = sae.W_dec.detach()
    dists = layer_distributions(sae, model, tokens)
    for figure in (
        plotting.plot_active_layers(active_layers(sae, model, tokens)),
        plotting.plot_variances(variances(sae, model, tokens)),
        plotting.plot_redundancy(redundancy(W_dec, dists, min_cos_sim=0.0)),
    ):
        figure.draw_without_rendering()
        for axes in figure.axes:
            legend = axes.get_legend()
            assert legend is not None
            box = legend.get_window_extent()
            assert not axes.xaxis.label.get_window_extent().overlaps(box)
            assert not axes.bbox.overlaps(box)
            assert figure.bbox.y0 <= box.y0


def test_residual_stream(model, tokens, tmp_path):
    residual = residual_stream(model, HOOK_NAMES, tokens)
    figure = plotting.plot_residual_stream(residual)
    assert image_of(figure.axes[0]) == pytest.approx(residual.cos_sim.numpy())
    assert lines_of(figure.axes[1])["mean"] == residual.norm.tolist()
    assert {"mean cosine similarity (centred)", "L2 norm"} <= labels_of(figure)
    save(figure, tmp_path)
    assert isinstance(residual, ResidualStream)


@pytest.mark.parametrize("n_pairs", [0, 4])
def test_redundancy(n_pairs, tmp_path):
    result = Redundancy(
        0.7,
        0.1,
        10,
        torch.zeros(n_pairs, 2, dtype=torch.long),
        torch.ones(n_pairs),
        torch.tensor([0.0, 0.5, 1.0, 1.0])[:n_pairs],
        torch.tensor([0.0, 1.0]),
    )
    figure = plotting.plot_redundancy(result)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[-1] == "2 random pairs: 50.0% disjoint"
    assert texts[:-1] == ["near-duplicates: 25.0% disjoint"][: n_pairs // 4]
    assert f"{n_pairs} near-duplicates" in figure.axes[0].get_title()
    save(figure, tmp_path)


def most_active_latent(sae, model, tokens) -> int:
    counts = layer_distributions(sae, model, tokens).counts.sum(0)
    return int(counts.argmax())


@pytest.mark.parametrize("kind", ["position", "frequency", "token"])
def test_token_classes(model, tokens, kind, tmp_path):
    sae = random_sae()
    latent = most_active_latent(sae, model, tokens)
    classes = token_classes(sae, model, tokens, [latent])
    texts = [f"w{i}" for i in range(D_VOCAB)]
    figure = plotting.plot_token_classes(
        classes, latent, kind, n_most=3, token_texts=texts
    )
    table = getattr(classes, f"by_{kind}")(latent)
    table = table.head(3) if kind == "token" else table
    shown = image_of(figure.axes[0])
    if kind == "position":
        assert np.isnan(np.delete(shown, table.index, axis=1)).all()
        shown = shown[:, table.index]
    assert shown == pytest.approx(table.filter(like="p_").to_numpy().T)
    assert f"P(layer | latent, {kind})" in labels_of(figure)
    if kind == "token":
        ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
        assert ticks == [f"w{i}" for i in table.index]
    save(figure, tmp_path)


def test_a_token_that_the_tokenizer_lacks_has_its_number(model, tokens):
    sae = random_sae()
    latent = most_active_latent(sae, model, tokens)
    classes = token_classes(sae, model, tokens, [latent])
    figure = plotting.plot_token_classes(classes, latent, "token", token_texts=["a"])
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == [f"[{i}]" for i in classes.by_token(latent).index[:30]]


@pytest.mark.parametrize("n_layers", [2, 30])
def test_transfer_matrix(n_layers, tmp_path):
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    fvu = torch.rand(n_layers, n_layers).double()
    figure = plotting.plot_transfer_matrix(
        TransferMatrix(names, names, 10, fvu, fvu[0])
    )
    assert image_of(figure.axes[0]) == pytest.approx(torch.cat([fvu, fvu[:1]]).numpy())
    assert len(figure.axes[0].texts) == (6 if n_layers == 2 else 0)
    figure.draw_without_rendering()
    bar_label = figure.axes[1].yaxis.label
    for text in (figure.axes[0].title, bar_label):
        box, whole = text.get_window_extent(), figure.bbox
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    assert "fraction of variance unexplained" in labels_of(figure)
    save(figure, tmp_path)


def test_comparison(tmp_path):
    multi, single = torch.rand(2, 2, len(COMPARED)).double()
    figure = plotting.plot_comparison(Comparison(HOOK_NAMES, multi, single))
    lines = lines_of(figure.axes[1])
    assert lines["one SAE"] == multi[:, COMPARED.index("delta_ce")].tolist()
    assert len(figure.axes) == 3
    save(figure, tmp_path)


def test_fvu_by_layer(model, tokens, tmp_path):
    metrics = evaluate(random_sae(), model, tokens)
    figure = plotting.plot_fvu_by_layer(metrics)
    lines = lines_of(figure.axes[0])
    assert lines["around the mean vector (fvu)"] == metrics.fvu.tolist()
    save(figure, tmp_path)
