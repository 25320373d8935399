"""The result of the study of interventions."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.analysis.nulls import NULL_TITLES
from sae_lens_multilayer.pictures.description import Picture
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.studies.intervals import intervals, ratio_intervals
from sae_lens_multilayer.studies.interventions.comparisons import (
    layer_profiles,
    line_of_sums,
    line_sums,
    same_meaning,
)
from sae_lens_multilayer.studies.interventions.controls import CONTROLS
from sae_lens_multilayer.studies.interventions.figures import picture

PREDICTIONS = "direct", "gradient", "integrated_gradients"
PROFILE_NUMBERS = (
    *("w1", "w1_random", "w1_null"),
    *("spearman", "spearman_random", "spearman_null"),
)
"""Columns of `layer_profiles` whose means are reported."""
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
    null: str
    """The null that was analysed, or ""."""
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
    change: Float[Tensor, "edit layer"]
    """|x' - x|^2: of the whole vector at each later layer."""
    error_change: Float[Tensor, "edit layer"]
    """The same of the reconstruction error, which no latent at that layer has."""
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
        """Mean effects of edits and controls; where the edit has the larger KL.

        Each with its 95% interval over latents, as `kl_low` and `kl_high`.
        """
        kl, target = self.kl.double().numpy(), self.target.abs().double().numpy()
        names = ["edit", *CONTROLS]
        larger = np.where(np.isnan(kl), np.nan, kl[:, :1] > kl).astype(float)
        larger[:, 0] = np.nan
        tables: list[pd.DataFrame] = []
        columns = {"kl": kl, "abs_target": target, "edit_is_larger": larger}
        for column, values in columns.items():
            means = zip(names, map(self._mean_parts, values.T), strict=True)
            found = ratio_intervals(dict(means)).add_prefix(f"{column}_")
            tables.append(found.rename(columns={f"{column}_value": column}))
        return pd.concat(tables, axis=1).rename_axis("what")

    def prediction_table(self) -> pd.DataFrame:
        """How well each prediction is that of the change of the target logit.

        A regression through 0 of the change on the prediction: `slope`, `r2` about 0,
        and `same_sign`, the share of the edits with the predicted sign; each with its
        95% interval over latents, as `slope_low` and `slope_high`.
        """
        changes = self.target[:, 0].double().numpy()
        rows: list[dict[str, float]] = []
        for predicted in self.predictions.double().numpy().T:
            sums = self._of_latents(line_sums(predicted, changes))
            found = intervals(sums.T, line_of_sums)
            rows.append(
                {
                    name + ("" if end == "value" else f"_{end}"): value
                    for name, row in found.to_dict("index").items()
                    for end, value in row.items()
                }
            )
        return pd.DataFrame(rows, pd.Index(PREDICTIONS, name="prediction"))

    def self_effects(self) -> pd.DataFrame:
        """One row for each edited layer and later layer.

        `slope` of M on D through 0: 1 passed on, below 1 erased or repaired, above 1
        amplified. `repair` is `1 - sum M / sum D`. `error_share` of the squared change
        of the vector is that of the reconstruction error; it may be above 1.
        """
        rows: list[dict[str, float]] = []
        n_layers = len(self.hook_names)
        names = "self_effect", "pass_through", "error_change", "change"
        columns = [getattr(self, name).double().numpy() for name in names]
        layer = self.layer.numpy()
        for low in range(n_layers):
            of_low = layer == low
            for high in range(low + 1, n_layers):
                if not of_low.any():
                    continue
                m, d, error, change = (column[of_low, high] for column in columns)
                line = line_of_sums(line_sums(d, m).sum(1))
                share = error.sum() / change.sum()
                row = {"layer": low, "later_layer": high, "n_edits": len(m), **line}
                rows.append(
                    {**row, "repair": 1 - m.sum() / d.sum(), "error_share": share}
                )
        return pd.DataFrame(rows)

    def layer_profiles(
        self,
        effect: Effect = "target",
        *,
        same_tokens: bool = True,
        n_permutations: int = 200,
    ) -> pd.DataFrame:
        """`C(l | j)`, proportional to the sum of |effect|, against `P(l | j)`.

        See `comparisons.layer_profiles`; one row for each latent. `w1_random` and
        `spearman_random` are those of the effects of random directions of the same
        length at the same tokens and layers. As this length grows with the activation,
        they agree with P too: only what the latent's effects agree better than these
        is evidence.

        Args:
            same_tokens: P of the edited tokens; False: of all tokens.
        """
        row, layer = self._row_of_edit(), self.layer.numpy()
        probs = self.probs.T.double().numpy()
        if same_tokens:
            sums = np.zeros_like(probs)
            np.add.at(sums, (row, layer), self.act.double().numpy())
            probs = sums / np.maximum(sums.sum(1, keepdims=True), 1e-300)
        sizes = getattr(self, effect).abs().double().numpy()
        random = 1 + [*CONTROLS].index("random")
        effects = {"": sizes[:, 0], "random": sizes[:, random]}
        table = layer_profiles(row, layer, effects, probs, n_permutations, self.seed)
        table.insert(0, "hit_rate", self.hit_rate.numpy())
        return table.set_index(pd.Index(self.latents.tolist(), name="latent"))

    def same_meaning(self) -> pd.DataFrame:
        """Cosines of effects at two layers; see `comparisons.same_meaning`.

        One row for each pair of layers, with means over latents and their number.
        """
        groups: Any = self._same_meaning().groupby(["layer", "later_layer"])
        table: Any = groups[["auc", "same", "others"]].mean()
        table.insert(1, "n_latents", groups["latent"].nunique())
        return table.reset_index()

    def _same_meaning(self) -> pd.DataFrame:
        where = np.stack([self.prompt.numpy(), self.position.numpy()])
        token = np.unique(where, axis=1, return_inverse=True)[1].ravel()
        return same_meaning(
            self._row_of_edit(),
            self.layer.numpy(),
            token,
            self.top_ids.numpy(),
            self.top_values.float().numpy(),
            len(self.hook_names),
            seed=self.seed,
        )

    def _row_of_edit(self) -> Int[np.ndarray, " edit"]:
        order = np.argsort(self.latents.numpy())
        ranks = np.searchsorted(self.latents.numpy()[order], self.latent.numpy())
        return order[ranks]

    def _of_latents(
        self, values: Float[np.ndarray, "*column edit"]
    ) -> Float[np.ndarray, "*column latent"]:
        """Sums over the edits of each latent."""
        sums = np.zeros((len(self.latents), *values.shape[:-1]))
        np.add.at(sums, self._row_of_edit(), np.moveaxis(values, -1, 0))
        return np.moveaxis(sums, 0, -1)

    def _mean_parts(
        self, values: Float[np.ndarray, " edit"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sum and number of the values of each latent's edits that are not NaN."""
        known = np.isfinite(values)
        return (
            self._of_latents(np.where(known, values, 0.0)),
            self._of_latents(known.astype(float)),
        )

    @property
    def summary(self) -> pd.DataFrame:
        """One number for each question, with its 95% interval over latents.

        Intervals are bootstraps: latents are drawn with replacement, with all of their
        edits. `self_effect_slope`, `repair` and `error_share` are those of
        `self_effects` over all pairs of layers; the columns of `layer_profiles` are
        means over latents with edits at three layers or more; `same_meaning_auc` is a
        mean over latents, pairs of layers and halves.
        """
        profiles, meaning = self.layer_profiles(), self._same_meaning()
        names = "self_effect", "pass_through", "error_change", "change"
        m, d, error, change = (
            self._of_latents(np.nansum(getattr(self, n).double().numpy(), 1))
            for n in names
        )
        moved, passed = (getattr(self, n).double().numpy() for n in names[:2])
        xx, xy = (
            self._of_latents(np.nansum(passed * other, 1)) for other in (passed, moved)
        )
        row = meaning["latent"].to_numpy(dtype=np.int64)
        auc, n_auc = (
            np.bincount(row, weights, len(self.latents))
            for weights in (meaning["auc"].to_numpy(dtype=float), None)
        )
        one = np.ones(len(self.latents))
        parts = {
            "n_edits_per_latent": (self._of_latents(np.ones(len(self.latent))), one),
            "hit_rate": (self.hit_rate.double().numpy(), one),
            "self_effect_slope": (xy, xx),
            "repair": (d - m, d),
            "error_share": (error, change),
            "same_meaning_auc": (auc, n_auc),
        }
        compared = profiles.where(profiles["n_layers"] > 2)
        for name in PROFILE_NUMBERS:
            parts[name] = compared[name].to_numpy(), one
        return ratio_intervals(parts)

    def numbers(self) -> dict[str, float]:
        values: dict[str, float] = self.summary["value"].to_dict()
        return {f"interventions_{name}": values[name] for name in PROFILE_NUMBERS}

    def pictures(self, **context: Any) -> dict[str, Picture]:
        drawn = picture(
            f"Interventions: activations times {self.alpha:g}{NULL_TITLES[self.null]}",
            self.hook_names,
            self.layer_profiles(),
            self.self_effects(),
            self.controls(),
            self.prediction_table(),
        )
        return {"": drawn}
