"""Distributions over layers by position, frequency and identity of the token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.analysis.active import check_latents, sums_device
from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.stream import single_analysis
from sae_lens_multilayer.analysis.tables import (
    layer_columns,
    layer_mean,
    layer_variance,
    make_table,
)
from sae_lens_multilayer.pictures.description import (
    Axis,
    Heatmap,
    Panel,
    Picture,
    Series,
    layer_axis,
    token_axis,
)
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of

ClassKind = Literal["position", "frequency", "token"]


@dataclass
class TokenClasses(Result):
    """Activations of some latents by layer, position in the prompt, and token id.

    A class is a position in the prompt, or `n_positions` plus a token id.
    """

    hook_names: list[str]
    latents: Int[Tensor, " latent"]
    n_positions: int
    """Length of the prompts."""
    counts: Int[Tensor, " class"]
    """Number of tokens of each class."""
    indices: Int[Tensor, "3 entry"]
    """Index into `latents`, layer and class of each of the `sums`."""
    sums: Float[Tensor, " entry"]
    """Sums of activations at a layer, and at `layer = n_layers` of the squares of a
    token's activation over all layers."""
    between_tokens: Float[Tensor, " latent"]
    """`Var_T(E[L | j, T])`, as in `Variances`; NaN if never active."""

    def by(self, kind: ClassKind, latent: int, n_bins: int = 8) -> pd.DataFrame:
        """The distribution over layers of a latent for each class of tokens.

        One row for each class at which the latent is active: number of tokens
        `n_tokens`, `share` of the latent's activation, mean layer, and `p_{layer}`.
        Classes are positions of the prompt; token ids, the largest share first; or
        token ids grouped by frequency, the rarest first: `n_bins` bins hold all tokens
        of their ids, about equally many, and are named by their numbers of tokens per
        id.
        """
        index, n_tokens, sums = self._classes(kind, latent, n_bins)
        total = sums[:-1].sum(0)
        probs = sums[:-1] / total
        share = total / total.sum()
        columns = {
            "n_tokens": n_tokens,
            "share": share,
            "mean_layer": layer_mean(probs),
        }
        columns |= layer_columns("p", self.hook_names, probs)
        table = make_table(columns, index)
        if kind == "token":
            table = table.sort_values("share", ascending=False, kind="stable")
        return table

    def explained(self, latent: int, n_bins: int = 8) -> pd.DataFrame:
        """The part of `Var(L | j)` that each kind of class explains.

        One row for each kind. `explained` is `Var(E[L | j, class]) / Var(L | j)`, with
        classes weighted by their share of the latent's activation: in [0, 1], and at
        most that of single tokens, `1 - token_ratio` of `Variances`. `by_chance` is
        about its expected value if layer and class are independent, large if most
        classes have few tokens. Both are NaN for a latent that is active at one layer.
        """
        between_tokens = self.between_tokens[self._index(latent)].item()
        rows: dict[str, dict[str, float]] = {}
        for kind in get_args(ClassKind):
            sums = self._classes(kind, latent, n_bins)[2]
            total = sums[:-1].sum(1)
            variance = layer_variance(total / total.sum()).item() or float("nan")
            rows[kind] = {
                "explained": _variance_of_means(sums) / variance,
                "by_chance": between_tokens * _share_by_chance(sums) / variance,
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("kind")

    def to_dataframe(self) -> pd.DataFrame:
        """All latents and kinds: `latent`, `kind`, `class`, then as `by`."""
        parts: list[pd.DataFrame] = []
        for latent in self.latents.tolist():
            for kind in get_args(ClassKind):
                table = self.by(kind, latent).rename_axis("class").reset_index()
                table.insert(0, "latent", latent)
                table.insert(1, "kind", kind)
                parts.append(table.astype({"class": str}))
        return pd.concat(parts, ignore_index=True)

    def pictures(
        self,
        text_of: Callable[[int], str] = "[{}]".format,
        n_most: int = 30,
        **context: Any,
    ) -> dict[str, Picture]:
        """Each latent's distribution over layers for each class, as `5_position`.

        Of the token ids, the `n_most` with the largest shares of the activation are
        drawn.
        """
        return {
            f"{latent}_{kind}": self._picture(kind, latent, text_of, n_most)
            for latent in self.latents.tolist()
            for kind in get_args(ClassKind)
        }

    def _picture(
        self, kind: ClassKind, latent: int, text_of: Callable[[int], str], n_most: int
    ) -> Picture:
        table = self.by(kind, latent)
        x = Axis("times that the token was seen", list(map(str, table.index)), 40)
        if kind == "token":
            table = table.head(n_most)
            label = "token, by share of the activation"
            x = token_axis(label, table.index.tolist(), text_of, 40)
        elif kind == "position":  # white where the latent is never active
            table = table.reindex(range(self.n_positions))
            x = Axis("position in the prompt", list(map(str, table.index)), 40)
        mean = table.mean_layer.to_numpy()
        probs = table.filter(like="p_").to_numpy().T
        panel = Panel(
            x,
            layer_axis(self.hook_names),
            [Series("mean layer", range(len(mean)), mean, "points")],
            Heatmap(probs, f"P(layer | latent, {kind})", top=None),
        )
        parts = self.explained(latent).loc[kind]
        caption = (
            f"The {kind} explains {parts.explained:.1%} of the variance over layers; "
            f"by chance it would be {parts.by_chance:.1%}."
        )
        return Picture(f"Latent {latent} by {kind}", [panel], caption)

    def _index(self, latent: int) -> int:
        found = (self.latents == latent).nonzero()
        if not len(found):
            raise ValueError(
                f"`latent` must be among {self.latents.tolist()}; got {latent}."
            )
        return int(found[0])

    def _classes(
        self, kind: ClassKind, latent: int, n_bins: int
    ) -> tuple[pd.Index, Tensor, Tensor]:
        """Name, number of tokens and sums of each class at which a latent is active.

        Sums are [row, class], with a row for each layer and a last one for squares.
        """
        offset = 0 if kind == "position" else self.n_positions
        chosen = self.indices[0] == self._index(latent)
        chosen &= (self.indices[2] >= self.n_positions) == (offset > 0)
        _, layer, class_ids = self.indices[:, chosen]
        found, column = class_ids.unique(return_inverse=True)
        sums = self.sums.new_zeros(len(self.hook_names) + 1, len(found))
        sums[layer, column] = self.sums[chosen]
        ids = found - offset
        if kind != "frequency":
            name = "position" if kind == "position" else "token_id"
            return pd.Index(ids.numpy(), name=name), self.counts[found], sums
        bin_of_id, labels, counts = self._frequency_bins(n_bins)
        used, column = bin_of_id[ids].unique(return_inverse=True)
        binned = sums.new_zeros(len(sums), len(used)).index_add_(1, column, sums)
        return pd.Index([labels[b] for b in used], name="seen"), counts[used], binned

    def _frequency_bins(
        self, n_bins: int
    ) -> tuple[Int[Tensor, " id"], list[str], Int[Tensor, " bin"]]:
        """The bin of each id, and the label and number of tokens of each bin."""
        counts = self.counts[self.n_positions :]
        levels, level = counts.unique(return_inverse=True)
        n_of_level = torch.zeros_like(levels).index_add_(0, level, counts)
        middle = n_of_level.cumsum(0) - n_of_level / 2
        bins = (middle / n_of_level.sum() * n_bins).long()
        used, bins = bins.unique(return_inverse=True)
        seen = [levels[(bins == b) & (levels > 0)] for b in range(len(used))]
        labels = [
            f"{s.min()}" if len(s) == 1 else f"{s.min()}-{s.max()}" if len(s) else "0"
            for s in seen
        ]
        total = torch.zeros(len(used)).long().index_add_(0, bins, n_of_level)
        return bins[level], labels, total


def _variance_of_means(sums: Float[Tensor, "row class"]) -> float:
    """`Var(E[L | class])`, with classes weighted by their activation."""
    totals = sums[:-1]
    share = totals.sum(0) / totals.sum()
    mean = layer_mean(totals / totals.sum(0))
    return (share * (mean - (share * mean).sum()).square()).sum().item()


def _share_by_chance(sums: Float[Tensor, "row class"]) -> float:
    """The expected share of the variance between tokens if tokens are shuffled.

    With a weight w for each token, `Var(mean of a class) = s^2 sum w^2 / (sum w)^2`
    for independent tokens of variance s^2. With W_c the sum of w and sq_c the sum of
    w^2 over a class, the expected variance between classes is
    `s^2 (sum_c sq_c / W_c - sq / W) / W`, that between tokens `s^2 (1 - sq / W^2)`.
    """
    totals, squares = sums[:-1].sum(0), sums[-1]
    total, square = totals.sum(), squares.sum()
    classes = ((squares / totals).sum() - square / total) / total
    tokens = 1 - square / total.square()
    return (classes / tokens).item() if tokens > 0 else 0.0


class TokenClassSums:
    """Adds up `TokenClasses` over tokens.

    Memory grows with the number of token ids at which a latent is active.
    """

    def __init__(self, sae: SAE[Any], latents: Sequence[int]) -> None:
        check_latents(latents, sae.cfg.d_sae)
        self._hook_names = hook_names_of(sae)
        self._latents = torch.tensor(list(latents), dtype=torch.int64)
        index = torch.full((sae.cfg.d_sae,), -1)
        index[self._latents] = torch.arange(len(self._latents))
        self._index_of_latent = index.to(sums_device(sae))
        self._n_positions = 0
        self._counts = self._keys = torch.zeros(0, dtype=torch.int64)
        self._sums = torch.zeros(0, dtype=torch.float64)
        # Sums of a, a m and a m^2 for activation a and mean layer m of a token.
        self._moments = torch.zeros(3, len(self._latents), dtype=torch.float64)

    def update(self, batch: TokenBatch) -> None:
        active, pairs = batch.active, batch.active.by_token
        latent, token, layer, value = self._chosen(
            active.latent, active.token, active.layer, active.value
        )
        index, pair_token, mean, total = self._chosen(
            pairs.latent, pairs.token, pairs.mean_layer, pairs.total
        )
        n_rows = active.n_layers + 1
        row = torch.cat([latent * n_rows + layer, index * n_rows + active.n_layers])
        token = torch.cat([token, pair_token])
        value = torch.cat([value, total.square()])
        self._n_positions = batch.prompts.shape[1]
        for classes in (batch.position, batch.token_ids + self._n_positions):
            counts = classes.bincount(minlength=len(self._counts))
            counts[: len(self._counts)] += self._counts
            self._counts = counts
            # Classes are below 2^32.
            self._add(row * 2**32 + classes[token], value)
        moments = torch.stack([total, total * mean, total * mean.square()])
        self._moments.index_add_(1, index, moments)

    def _chosen(self, latent: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Indices of the chosen latents, and the entries of the others for these."""
        index = self._index_of_latent[latent]
        chosen = index >= 0
        return tuple(tensor[chosen].cpu() for tensor in (index, *others))

    def _add(self, keys: Tensor, values: Tensor) -> None:
        self._keys, entry = torch.cat([self._keys, keys]).unique(return_inverse=True)
        sums = torch.zeros(len(self._keys), dtype=torch.float64)
        self._sums = sums.index_add_(0, entry, torch.cat([self._sums, values]))

    def compute(self) -> TokenClasses:
        row, class_id = self._keys // 2**32, self._keys % 2**32
        n_rows = len(self._hook_names) + 1
        indices = torch.stack([row // n_rows, row % n_rows, class_id])
        total, first, second = self._moments
        between = (second / total - (first / total).square()).clamp(min=0)
        return TokenClasses(
            self._hook_names,
            self._latents,
            self._n_positions,
            self._counts,
            indices,
            self._sums,
            between,
        )


token_classes = single_analysis(TokenClassSums)
"""The distribution over layers of some latents by position, frequency and token."""
