"""The picture of the study of interventions."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sae_lens_multilayer.pictures.description import (
    Axis,
    Heatmap,
    Panel,
    Picture,
    Series,
    histogram,
    layer_axis,
)

_PROFILES = {
    "": "effects of the latent",
    "_random": "of random directions",
    "_null": "layers permuted",
}


def picture(
    title: str,
    hook_names: Sequence[str],
    profiles: pd.DataFrame,
    self_effects: pd.DataFrame,
    controls: pd.DataFrame,
    predictions: pd.DataFrame,
) -> Picture:
    """The tables of `Interventions`, each in a panel."""
    compared = profiles.loc[profiles["n_layers"] > 2]
    w1, random, null, rank, random_rank = (
        compared[name].mean()
        for name in ("w1", "w1_random", "w1_null", "spearman", "spearman_random")
    )
    panels = [
        _self_effect_panel(hook_names, self_effects),
        _profile_panel(compared),
        _control_panel(controls),
        _prediction_panel(predictions),
    ]
    caption = (
        f"{len(profiles):,} latents, active at {profiles['hit_rate'].mean():.1%} of "
        f"the tokens. C(l | j) of effects and P(l | j) differ by {w1:.2f} layers, with "
        f"random directions of the same length by {random:.2f}, with layers permuted "
        f"by {null:.2f}; Spearman {rank:.2f}, with random directions "
        f"{random_rank:.2f}. Intervals are over latents."
    )
    return Picture(title, panels, caption, n_columns=2)


def _self_effect_panel(hook_names: Sequence[str], table: pd.DataFrame) -> Panel:
    n_layers = len(hook_names)
    slopes = np.full((n_layers, n_layers), np.nan)
    if len(table):
        slopes[table.later_layer, table.layer] = table.slope.clip(0, 2)
    x = layer_axis(hook_names, "edited layer")
    y = layer_axis(hook_names, "later layer")
    label = "slope of M on D"
    return Panel(x, y, heatmap=Heatmap(slopes, label, top=2.0, colours="RdBu"))


def _profile_panel(compared: pd.DataFrame) -> Panel:
    values = {text: compared[f"w1{end}"].dropna() for end, text in _PROFILES.items()}
    top = max((v.max() for v in values.values() if len(v)), default=1.0)
    edges = np.linspace(0, max(1e-6, top), 21)
    middles = (edges[1:] + edges[:-1]) / 2
    lines = [
        Series(text, middles, histogram(text, v.to_numpy(), edges).y, style=i)
        for i, (text, v) in enumerate(values.items())
    ]
    axis = Axis("W1 of C(l | j) and P(l | j) (layers)")
    return Panel(axis, Axis("latents", include_zero=True), lines)


def _control_panel(table: pd.DataFrame) -> Panel:
    x, names = range(len(table)), [n.replace("_", " ") for n in table.index]
    kl, low, high = (table[n].to_numpy() for n in ("kl", "kl_low", "kl_high"))
    series = [
        Series("mean KL", x, kl, "points"),
        Series("95% interval", x, low, "intervals", high),
    ]
    return Panel(Axis("", names), Axis("KL (nats)", log=True), series)


def _prediction_panel(table: pd.DataFrame) -> Panel:
    names = [name.replace("_", " ") for name in table.index]
    series: list[Series] = []
    labels = {"slope": "slope", "r2": "R²", "same_sign": "same sign"}
    for i, (name, label) in enumerate(labels.items()):
        x = [j + 0.27 * (i - 1) for j in range(len(table))]
        y, low, high = (table[f"{name}{end}"] for end in ("", "_low", "_high"))
        series += [
            Series(label, x, y.to_numpy(), "bars", width=0.25, colour=i),
            Series("", x, low.to_numpy(), "intervals", high.to_numpy(), colour=3),
        ]
    return Panel(Axis("prediction of the target logit", names), Axis(""), series)
