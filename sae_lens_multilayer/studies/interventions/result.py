"""The result of the study of interventions."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.pictures.description import (
    Axis,
    Heatmap,
    Panel,
    Picture,
    Series,
    histogram,
    layer_axis,
)
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.studies.interventions.comparisons import (
    layer_profiles,
    line_through_origin,
    same_meaning,
)
from sae_lens_multilayer.studies.interventions.controls import CONTROLS

PREDICTIONS = "direct", "gradient", "integrated_gradients"
Effect = Literal["kl", "target"]


@dataclass
class Interventions(Result):
    """Edits of latents where they are active, one layer and token each.

    An edit of latent j with activation a at layer l and token t adds
    `dx = (alpha - 1) a std W_dec[j]` (through the inverse of the lens), so the error
    term is kept. Effects are on the prediction after the token itself. Layers are
    indices into the layer axis.
    """

    hook_names: list[str]
    alpha: float
    seed: int
    latents: Int[Tensor, " latent"]
    probs: Float[Tensor, "layer latent"]
    """`P(l | j)` over all tokens."""
    hit_rate: Float[Tensor, " latent"]
    """Share of all tokens at which the latent is active at any layer."""
    latent: Int[Tensor, " edit"]
    layer: Int[Tensor, " edit"]
    prompt: Int[Tensor, " edit"]
    position: Int[Tensor, " edit"]
    act: Float[Tensor, " edit"]
    """Activation before the edit."""
    norm: Float[Tensor, " edit"]
    """`|dx|`."""
    kl: Float[Tensor, "edit kind"]
    """KL(clean ‖ edited) in nats: of the edit, then of its `CONTROLS`. NaN where a
    control does not exist."""
    target: Float[Tensor, "edit kind"]
    """Change of the logit of the clean run's most likely token."""
    predictions: Float[Tensor, "edit 3"]
    """Of this change: on the direct path (final norm frozen), by the gradient times dx,
    and by integrated gradients."""
    self_effect: Float[Tensor, "edit layer"]
    """M: change of the latent's pre-activation at each later layer; NaN before."""
    pass_through: Float[Tensor, "edit layer"]
    """D: what M would be if dx were passed on and norms were frozen,
    `W_enc[j] . T dx / std`, at each later layer."""
    effect_norm: Float[Tensor, " edit"]
    """Norm of the change of all logits, less its mean."""
    top_ids: Int[Tensor, "edit top"]
    """Tokens with the largest changes of logits."""
    top_values: Float[Tensor, "edit top"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each edit."""
        names = ("latent", "layer", "prompt", "position", "act", "norm", "effect_norm")
        columns = {name: getattr(self, name).numpy() for name in names}
        for effect in ("kl", "target"):
            values = getattr(self, effect).numpy().T
            columns[effect] = values[0]
            columns |= {
                f"{effect}_{control}": v
                for control, v in zip(CONTROLS, values[1:], strict=True)
            }
        predicted = zip(PREDICTIONS, self.predictions.numpy().T, strict=True)
        return pd.DataFrame(columns | {f"predicted_{n}": v for n, v in predicted})

    def controls(self) -> pd.DataFrame:
        """Mean effects of edits and controls; where the edit has the larger KL."""
        kl, target = self.kl.numpy(), np.abs(self.target.numpy())
        share = [np.nan, *(_share_larger(kl[:, 0], c) for c in kl.T[1:])]
        columns = {
            "kl": np.nanmean(kl, 0),
            "abs_target": np.nanmean(target, 0),
            "edit_is_larger": share,
        }
        return pd.DataFrame(columns, pd.Index(["edit", *CONTROLS], name="what"))

    def prediction_table(self) -> pd.DataFrame:
        """How well each prediction is that of the change of the target logit.

        A regression through 0 of the change on the prediction: `slope`, `r2` about 0,
        and `same_sign`, the share of the edits with the predicted sign.
        """
        changes = self.target[:, 0].double().numpy()
        rows = [
            line_through_origin(predicted, changes)
            for predicted in self.predictions.double().numpy().T
        ]
        return pd.DataFrame(rows, pd.Index(PREDICTIONS, name="prediction"))

    def self_effects(self) -> pd.DataFrame:
        """One row for each edited layer and later layer.

        `slope` of M on D through 0: 1 passed on, below 1 erased or repaired, above 1
        amplified. `repair` is `1 - sum M / sum D`.
        """
        rows: list[dict[str, float]] = []
        n_layers = len(self.hook_names)
        moved, passed = self.self_effect.double(), self.pass_through.double()
        for low in range(n_layers):
            for high in range(low + 1, n_layers):
                chosen = self.layer == low
                m, d = moved[chosen, high].numpy(), passed[chosen, high].numpy()
                if not len(m):
                    continue
                line = line_through_origin(d, m)
                repair = 1 - m.sum() / d.sum()
                row = {"layer": low, "later_layer": high, "n_edits": len(m)}
                rows.append({**row, **line, "repair": repair})
        return pd.DataFrame(rows)

    def layer_profiles(
        self,
        effect: Effect = "target",
        *,
        same_tokens: bool = True,
        n_permutations: int = 200,
    ) -> pd.DataFrame:
        """`C(l | j)`, proportional to the sum of |effect|, against `P(l | j)`.

        See `comparisons.layer_profiles`; one row for each latent.

        Args:
            same_tokens: P of the edited tokens; False: of all tokens.
        """
        row = self._row_of_edit()
        probs = self.probs.T.double().numpy()
        if same_tokens:
            sums = np.zeros_like(probs)
            np.add.at(sums, (row, self.layer.numpy()), self.act.double().numpy())
            probs = sums / np.maximum(sums.sum(1, keepdims=True), 1e-300)
        size = np.abs(getattr(self, effect)[:, 0].double().numpy())
        table = layer_profiles(
            row, self.layer.numpy(), size, probs, n_permutations, self.seed
        )
        table.insert(0, "hit_rate", self.hit_rate.numpy())
        return table.set_index(pd.Index(self.latents.tolist(), name="latent"))

    def same_meaning(self) -> pd.DataFrame:
        """Cosines of effects at two layers; see `comparisons.same_meaning`."""
        return same_meaning(
            self._row_of_edit(),
            self.layer.numpy(),
            self.top_ids.numpy(),
            self.top_values.float().numpy(),
            len(self.hook_names),
        )

    def _row_of_edit(self) -> Int[np.ndarray, " edit"]:
        order = np.argsort(self.latents.numpy())
        ranks = np.searchsorted(self.latents.numpy()[order], self.latent.numpy())
        return order[ranks]

    @property
    def summary(self) -> pd.Series:
        """The means of the tables: one number for each question."""
        profiles, meaning = self.layer_profiles(), self.same_meaning()
        effects = self.self_effects()
        weights = meaning.n_latents.to_numpy()
        auc = np.average(meaning.auc, weights=weights) if len(meaning) else np.nan
        return pd.Series(
            {
                "n_edits": len(self.latent),
                "hit_rate": float(self.hit_rate.mean()),
                "self_effect_slope": effects.slope.mean() if len(effects) else np.nan,
                "w1": profiles.w1[profiles.n_layers > 2].mean(),
                "w1_null": profiles.w1_null.mean(),
                "spearman": profiles.spearman.mean(),
                "same_meaning_auc": auc,
            },
            name="value",
        )

    def numbers(self) -> dict[str, float]:
        numbers: dict[str, float] = self.summary.to_dict()
        return {f"interventions_{n}": numbers[n] for n in ("w1", "spearman")}

    def pictures(self, **context: Any) -> dict[str, Picture]:
        profiles, controls = self.layer_profiles(), self.controls()
        compared = profiles[profiles.n_layers > 2]
        edges = np.linspace(0, max(1e-6, np.nanmax([*profiles.w1, 1e-6])), 21)
        w1 = {"effects": compared.w1, "layers permuted": compared.w1_null}
        bars = [histogram(n, v.dropna().to_numpy(), edges) for n, v in w1.items()]
        names = [n.replace("_", " ") for n in controls.index]
        kl = Series("mean KL", range(len(names)), controls.kl.to_numpy(), "points")
        w1_axis = Axis("W1 of effects and activations (layers)")
        panels = [
            self._self_effect_panel(),
            Panel(w1_axis, Axis("latents"), bars),
            Panel(Axis("", names), Axis("KL (nats)", log=True), [kl]),
            self._prediction_panel(),
        ]
        caption = (
            f"{len(self.latent):,} edits of {len(self.latents):,} latents, which are "
            f"active at {float(self.hit_rate.mean()):.1%} of the tokens. C(l | j) of "
            f"effects and P(l | j) differ by {compared.w1.mean():.2f} layers, with "
            f"layers permuted by {compared.w1_null.mean():.2f}; Spearman "
            f"{compared.spearman.mean():.2f}."
        )
        title = f"Interventions: activations times {self.alpha:g}"
        return {"": Picture(title, panels, caption, n_columns=2)}

    def _self_effect_panel(self) -> Panel:
        n_layers, table = len(self.hook_names), self.self_effects()
        slopes = np.full((n_layers, n_layers), np.nan)
        if len(table):
            slopes[table.later_layer, table.layer] = table.slope.clip(0, 2)
        x = layer_axis(self.hook_names, "edited layer")
        y = layer_axis(self.hook_names, "later layer")
        label = "slope of M on D"
        return Panel(x, y, heatmap=Heatmap(slopes, label, top=2.0, colours="RdBu"))

    def _prediction_panel(self) -> Panel:
        table = self.prediction_table()
        names = [name.replace("_", " ") for name in table.index]
        bars = [
            Series(
                label,
                [i + shift for i in range(3)],
                table[n].to_numpy(),
                "bars",
                width=0.25,
            )
            for shift, (n, label) in zip(
                (-0.27, 0.0, 0.27),
                {"slope": "slope", "r2": "R^2", "same_sign": "same sign"}.items(),
                strict=True,
            )
        ]
        return Panel(Axis("prediction of the target logit", names), Axis(""), bars)


def _share_larger(own: np.ndarray, other: np.ndarray) -> float:
    both = np.isfinite(other)
    return float((own[both] > other[both]).mean()) if both.any() else np.nan
