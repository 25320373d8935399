"""Distributions over layers by position, frequency and identity of the token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.active import check_latents, sums_device
from sae_lens_multilayer.analysis.stream import PassOptions, TokenBatch, Tokens, analyze
from sae_lens_multilayer.analysis.tables import (
    by_layer,
    layer_mean,
    layer_variance,
    make_table,
)
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of

ClassKind = Literal["position", "frequency", "token"]


@dataclass
class TokenClasses(Result):
    """Activations of some latents by layer, position in the prompt, and token id."""

    hook_names: list[str]
    latents: Int[Tensor, " latent"]
    position_counts: Int[Tensor, " pos"]
    """Number of tokens at each position."""
    position_indices: Int[Tensor, "3 entry"]
    """Index into `latents`, layer and position of `position_sums`, sorted."""
    position_sums: Float[Tensor, " entry"]
    """Sums of activations at a layer, and at `layer = n_layers` of the squares of a
    token's activation over all layers."""
    token_counts: Int[Tensor, " id"]
    """Number of tokens of each id, up to the largest id of the tokens."""
    token_indices: Int[Tensor, "3 token_entry"]
    """As `position_indices`, with token ids."""
    token_sums: Float[Tensor, " token_entry"]
    """As `position_sums`."""
    between_tokens: Float[Tensor, " latent"]
    """`Var_T(E[L | j, T])`, as in `Variances`; NaN if never active."""

    def by_position(self, latent: int) -> pd.DataFrame:
        """The distribution over layers at each position of the prompt.

        One row for each position at which the latent is active: number of tokens
        `n_tokens`, `share` of the latent's activation, mean layer, and `p_{layer}`.
        """
        return self._table(self._classes(latent, "position"))

    def by_token(self, latent: int) -> pd.DataFrame:
        """As `by_position` for each token id, the largest share first."""
        table = self._table(self._classes(latent, "token"))
        return table.sort_values("share", ascending=False, kind="stable")

    def by_frequency(self, latent: int, n_bins: int = 8) -> pd.DataFrame:
        """As `by_position` for token ids grouped by frequency, the rarest first.

        Each bin holds all tokens of its ids, and about as many tokens as the others.
        The index is the range of the number of tokens per id.
        """
        return self._table(self._frequencies(latent, n_bins))

    def explained(self, latent: int, n_bins: int = 8) -> pd.DataFrame:
        """The part of `Var(L | j)` that each kind of class explains.

        One row for each kind. `explained` is `Var(E[L | j, class]) / Var(L | j)`, with
        classes weighted by their share of the latent's activation: in [0, 1], and at
        most that of single tokens, `1 - token_ratio` of `Variances`. `by_chance` is
        about its expected value if layer and class are independent, large if most
        classes have few tokens. Both are NaN for a latent that is active at one layer.
        """
        kinds = {
            "position": self._classes(latent, "position"),
            "frequency": self._frequencies(latent, n_bins),
            "token": self._classes(latent, "token"),
        }
        total = kinds["position"].totals.sum(1)
        variance = layer_variance(total / total.sum()).item() or float("nan")
        between_tokens = self.between_tokens[self._index(latent)].item()
        rows = {
            kind: {
                "explained": classes.variance_of_means() / variance,
                "by_chance": between_tokens * classes.share_by_chance() / variance,
            }
            for kind, classes in kinds.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("kind")

    def to_dataframe(self) -> pd.DataFrame:
        """All latents and kinds: `latent`, `kind`, `class`, then as `by_position`."""
        parts: list[pd.DataFrame] = []
        for latent in self.latents.tolist():
            for kind in get_args(ClassKind):
                table: pd.DataFrame = getattr(self, f"by_{kind}")(latent)
                table = table.rename_axis("class").reset_index()
                table.insert(0, "latent", latent)
                table.insert(1, "kind", kind)
                parts.append(table.astype({"class": str}))
        return pd.concat(parts, ignore_index=True)

    def _index(self, latent: int) -> int:
        found = (self.latents == latent).nonzero()
        if not len(found):
            raise ValueError(
                f"`latent` must be among {self.latents.tolist()}; got {latent}."
            )
        return int(found[0])

    def _classes(self, latent: int, kind: str) -> "_Classes":
        counts, indices, sums = (
            getattr(self, f"{kind}_{name}") for name in ("counts", "indices", "sums")
        )
        chosen = indices[0] == self._index(latent)
        _, layer, class_id = indices[:, chosen]
        ids, column = class_id.unique(return_inverse=True)
        dense = sums.new_zeros(len(self.hook_names) + 1, len(ids))
        dense[layer, column] = sums[chosen]
        name = "token_id" if kind == "token" else kind
        index = pd.Index(ids.numpy(), name=name)
        return _Classes(index, counts[ids], dense[:-1], dense[-1])

    def _frequencies(self, latent: int, n_bins: int) -> "_Classes":
        tokens = self._classes(latent, "token")
        bin_of_id, labels, counts = self._frequency_bins(n_bins)
        bins = bin_of_id[torch.tensor(tokens.index.to_numpy())]
        totals = tokens.totals.new_zeros(len(tokens.totals), len(labels))
        squares = tokens.squares.new_zeros(len(labels))
        return _Classes(
            pd.Index(labels, name="seen"),
            counts,
            totals.index_add_(1, bins, tokens.totals),
            squares.index_add_(0, bins, tokens.squares),
        )

    def _frequency_bins(
        self, n_bins: int
    ) -> tuple[Int[Tensor, " id"], list[str], Int[Tensor, " bin"]]:
        """The bin of each id, and the label and number of tokens of each bin."""
        if n_bins < 1:
            raise ValueError(f"`n_bins` must be at least 1; got {n_bins}.")
        counts = self.token_counts
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

    def _table(self, classes: "_Classes") -> pd.DataFrame:
        total = classes.totals.sum(0)
        probs = classes.totals / total
        columns = {
            "n_tokens": classes.n_tokens,
            "share": total / total.sum(),
            "mean_layer": layer_mean(probs),
        }
        columns |= by_layer("p", self.hook_names, probs)
        table = make_table(columns, classes.index)
        return table.loc[(total > 0).numpy()]


@dataclass
class _Classes:
    """Sums of the activations of one latent at the tokens of each class."""

    index: pd.Index
    n_tokens: Int[Tensor, " class"]
    totals: Float[Tensor, "layer class"]
    squares: Float[Tensor, " class"]
    """Sum over tokens of the square of their activation over all layers."""

    def variance_of_means(self) -> float:
        """`Var(E[L | class])`, with classes weighted by their activation."""
        totals = self.totals[:, self.squares > 0]
        share = totals.sum(0) / totals.sum()
        mean = layer_mean(totals / totals.sum(0))
        return (share * (mean - (share * mean).sum()).square()).sum().item()

    def share_by_chance(self) -> float:
        """The expected share of the variance between tokens if tokens are shuffled.

        With a weight w for each token, `Var(mean of a class) = s^2 sum w^2 / (sum w)^2`
        for independent tokens of variance s^2. With W_c the sum of w and sq_c the sum
        of w^2 over a class, the expected variance between classes is
        `s^2 (sum_c sq_c / W_c - sq / W) / W`, that between tokens `s^2 (1 - sq / W^2)`.
        """
        used = self.squares > 0
        totals, squares = self.totals.sum(0)[used], self.squares[used]
        total, square = totals.sum(), squares.sum()
        classes = ((squares / totals).sum() - square / total) / total
        tokens = 1 - square / total.square()
        return (classes / tokens).item() if tokens > 0 else 0.0


class TokenClassSums:
    """Adds up `TokenClasses` over tokens.

    Memory grows with the number of token ids at which a latent is active.
    """

    def __init__(self, sae: SAE[Any], latents: Sequence[int]) -> None:
        """Start without tokens.

        Raises:
            ValueError: If a latent is unknown.
        """
        check_latents(latents, sae.cfg.d_sae)
        self._hook_names = hook_names_of(sae)
        self._latents = torch.tensor(list(latents), dtype=torch.int64)
        index = torch.full((sae.cfg.d_sae,), -1)
        index[self._latents] = torch.arange(len(self._latents))
        self._index_of_latent = index.to(sums_device(sae))
        self._positions, self._tokens = _ClassSums(), _ClassSums()
        # Sums of a, a m and a m^2 for activation a and mean layer m of a token.
        self._moments = torch.zeros(3, len(self._latents), dtype=torch.float64)

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens."""
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
        self._positions.add(batch.position, row, token, value)
        self._tokens.add(batch.token_ids, row, token, value)
        moments = torch.stack([total, total * mean, total * mean.square()])
        self._moments.index_add_(1, index, moments)

    def _chosen(self, latent: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Indices of the chosen latents, and the entries of the others for these."""
        index = self._index_of_latent[latent]
        chosen = index >= 0
        return tuple(tensor[chosen].cpu() for tensor in (index, *others))

    def compute(self) -> TokenClasses:
        """The sums over all tokens so far."""
        n_rows = len(self._hook_names) + 1
        total, first, second = self._moments
        between = (second / total - (first / total).square()).clamp(min=0)
        return TokenClasses(
            self._hook_names,
            self._latents,
            self._positions.counts,
            self._positions.indices(n_rows),
            self._positions.sums,
            self._tokens.counts,
            self._tokens.indices(n_rows),
            self._tokens.sums,
            between,
        )


class _ClassSums:
    """Counts of tokens by class, and sums by row and class, stored sparsely."""

    def __init__(self) -> None:
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.sums = torch.zeros(0, dtype=torch.float64)
        self._keys = torch.zeros(0, dtype=torch.int64)

    def add(self, classes: Tensor, row: Tensor, token: Tensor, value: Tensor) -> None:
        """Count the class of each token, and add values for some rows and tokens."""
        counts = classes.bincount(minlength=len(self.counts))
        counts[: len(self.counts)] += self.counts
        self.counts = counts
        # Classes are positions or token ids, which are below 2^32.
        keys = torch.cat([self._keys, row * 2**32 + classes[token]])
        self._keys, entry = keys.unique(return_inverse=True)
        sums = torch.zeros(len(self._keys), dtype=torch.float64)
        self.sums = sums.index_add_(0, entry, torch.cat([self.sums, value]))

    def indices(self, n_rows: int) -> Int[Tensor, "3 entry"]:
        """Row over and modulo `n_rows`, and class of each sum, sorted."""
        row, class_id = self._keys // 2**32, self._keys % 2**32
        return torch.stack([row // n_rows, row % n_rows, class_id])


def token_classes(
    sae: SAE[Any],
    model: Any,
    tokens: Tokens,
    latents: Sequence[int],
    **options: Unpack[PassOptions],
) -> TokenClasses:
    """The distribution over layers of some latents by position, frequency and token.

    Raises:
        ValueError: If a latent is unknown, or as `analyze`.
    """
    return analyze(sae, model, tokens, TokenClassSums(sae, latents), **options)[0]
