"""Does the layer at which a latent is active depend on the token?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.active import check_latents, sums_device
from sae_lens_multilayer.analysis.layer_variances import variance_over_layers
from sae_lens_multilayer.analysis.results import Result
from sae_lens_multilayer.analysis.stream import PassOptions, TokenBatch, analyze
from sae_lens_multilayer.hooks import layer_labels
from sae_lens_multilayer.sae.views import hook_names_of

ClassKind = Literal["position", "frequency", "token"]


@dataclass
class TokenClasses(Result):
    """Activations of some latents by layer, position in the prompt, and token id."""

    hook_names: list[str]
    latents: Int[Tensor, " latent"]
    """The latents that were chosen."""
    position_counts: Int[Tensor, " pos"]
    """Tokens at each position."""
    token_counts: Int[Tensor, " id"]
    """Tokens of each id, up to the largest that was seen."""
    position_totals: Float[Tensor, "latent layer pos"]
    """Sum of the activations at each layer and position."""
    token_indices: Int[Tensor, "3 entry"]
    """Latent (its place among those chosen), layer and token id of `token_totals`."""
    token_totals: Float[Tensor, " entry"]
    """Sum of the activations of a latent at a layer at all tokens of an id."""
    position_squares: Float[Tensor, "latent pos"]
    """Sum over tokens of the square of their activation over all layers."""
    token_square_indices: Int[Tensor, "2 pair"]
    """Latent (its place) and token id of `token_squares`."""
    token_squares: Float[Tensor, " pair"]
    """As `position_squares`, for all tokens of an id."""
    between_tokens: Float[Tensor, " latent"]
    """`Var_T(E[L | j, T])`, as in `Variances`; NaN if the latent was never active."""

    def by_position(self, latent: int) -> pd.DataFrame:
        """The distribution over layers at each position of the prompt.

        One row for each position where the latent is active: `n_tokens` there, its
        `share` of the latent's activation, the mean layer, and `p_{layer}`.
        """
        totals = self.position_totals[self._place(latent)]
        classes = pd.RangeIndex(totals.shape[1], name="position")
        return self._table(totals, classes, self.position_counts)

    def by_token(self, latent: int) -> pd.DataFrame:
        """The same for each token id, the one with the largest share first."""
        totals, ids = self._of_tokens(latent)
        index = pd.Index(ids.numpy(), name="token_id")
        table = self._table(totals, index, self.token_counts[ids])
        return table.sort_values("share", ascending=False, kind="stable")

    def by_frequency(self, latent: int, n_bins: int = 8) -> pd.DataFrame:
        """The same for tokens of different frequency, the rarest first.

        Each bin holds about as many of the tokens seen, and all tokens of an id; the
        index is the range of the number of times that such ids were seen.
        """
        totals, ids = self._of_tokens(latent)
        bin_of_id, labels, counts = self._frequency_bins(n_bins)
        binned = totals.new_zeros(len(totals), len(labels))
        binned.index_add_(1, bin_of_id[ids], totals)
        return self._table(binned, pd.Index(labels, name="seen"), counts)

    def explained(self, latent: int, n_bins: int = 8) -> pd.DataFrame:
        """The part of `Var(L | j)` that each kind of class accounts for.

        One row for each kind. `explained` is `Var(E[L | j, class]) / Var(L | j)`, with
        classes weighted by their share of the latent's activation: in [0, 1], and at
        most what single tokens account for, `1 - token_ratio` of `Variances`.
        `by_chance` is what it would be about if the layer had nothing to do with the
        class: much, where most classes have few tokens. Both are NaN if the latent is
        active at one layer only.
        """
        place = self._place(latent)
        probs = self.position_totals[place].sum(1)
        variance = variance_over_layers(probs / probs.sum()).item() or float("nan")
        squares = self.position_squares[place]
        parts = {
            "position": (self.by_position(latent), squares[squares > 0]),
            "frequency": (
                self.by_frequency(latent, n_bins),
                self._squares_by_frequency(place, n_bins),
            ),
            "token": (
                self.by_token(latent),
                self.token_squares[self.token_square_indices[0] == place],
            ),
        }
        rows: dict[str, dict[str, float]] = {}
        for kind, (table, squares) in parts.items():
            mean = (table.share * table.mean_layer).sum()
            between = float((table.share * (table.mean_layer - mean) ** 2).sum())
            totals = torch.tensor((table.share * probs.sum().item()).to_numpy())
            if kind == "token":  # `squares` are in the order of the ids
                totals = totals[torch.tensor(table.index.to_numpy()).argsort()]
            chance = self.between_tokens[place].item() * _share_by_chance(
                totals, squares
            )
            rows[kind] = {
                "explained": between / variance,
                "by_chance": chance / variance,
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("kind")

    def _squares_by_frequency(self, place: int, n_bins: int) -> Float[Tensor, " class"]:
        bin_of_id, labels, _ = self._frequency_bins(n_bins)
        chosen = self.token_square_indices[0] == place
        ids = self.token_square_indices[1, chosen]
        squares = torch.zeros(len(labels), dtype=torch.float64)
        squares.index_add_(0, bin_of_id[ids], self.token_squares[chosen])
        return squares[squares > 0]

    def to_dataframe(self) -> pd.DataFrame:
        """All classes of all latents: `latent`, `kind` and `class`, then as above."""
        parts: list[pd.DataFrame] = []
        for latent in self.latents.tolist():
            for kind in get_args(ClassKind):
                table: pd.DataFrame = getattr(self, f"by_{kind}")(latent)
                table = table.rename_axis("class").reset_index()
                table.insert(0, "latent", latent)
                table.insert(1, "kind", kind)
                parts.append(table.astype({"class": str}))
        return pd.concat(parts, ignore_index=True)

    def _place(self, latent: int) -> int:
        places = (self.latents == latent).nonzero()
        if not len(places):
            raise ValueError(
                f"Latent {latent} was not chosen; those that were are "
                f"{self.latents.tolist()}."
            )
        return int(places[0])

    def _of_tokens(
        self, latent: int
    ) -> tuple[Float[Tensor, "layer class"], Int[Tensor, " class"]]:
        chosen = self.token_indices[0] == self._place(latent)
        _, layer, token_id = self.token_indices[:, chosen]
        ids, column = token_id.unique(return_inverse=True)
        totals = self.token_totals.new_zeros(len(self.hook_names), len(ids))
        totals[layer, column] = self.token_totals[chosen]
        return totals, ids

    def _frequency_bins(
        self, n_bins: int
    ) -> tuple[Int[Tensor, " id"], list[str], Int[Tensor, " bin"]]:
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

    def _table(
        self,
        totals: Float[Tensor, "layer class"],
        classes: pd.Index,
        n_tokens: Int[Tensor, " class"],
    ) -> pd.DataFrame:
        total = totals.sum(0)
        probs = totals / total
        layers = torch.arange(len(totals)).double().unsqueeze(1)
        table = pd.DataFrame(
            {
                "n_tokens": n_tokens.numpy(),
                "share": (total / total.sum()).numpy(),
                "mean_layer": (probs * layers).sum(0).numpy(),
            }
            | {
                f"p_{label}": p.numpy()
                for label, p in zip(layer_labels(self.hook_names), probs, strict=True)
            },
            index=classes,
        )
        return table.loc[(total > 0).numpy()]


class TokenClassSums:
    """Adds up `TokenClasses` over tokens.

    Memory grows with the ids that a latent is active at, up to the vocabulary.
    """

    def __init__(self, sae: SAE[Any], latents: Sequence[int]) -> None:
        """Start at no token.

        Args:
            sae: The SAE that will be analysed.
            latents: The latents to look at.

        Raises:
            ValueError: If a latent is unknown.
        """
        check_latents(latents, sae.cfg.d_sae)
        self._hook_names = hook_names_of(sae)
        self._latents = torch.tensor(list(latents), dtype=torch.int64)
        place = torch.full((sae.cfg.d_sae,), -1)
        place[self._latents] = torch.arange(len(self._latents))
        self._place = place.to(sums_device(sae))
        self._position_counts = torch.zeros(0, dtype=torch.int64)
        self._token_counts = torch.zeros(0, dtype=torch.int64)
        self._at_positions, self._at_ids = _SparseSums(), _SparseSums()
        self._squares_at_positions, self._squares_at_ids = _SparseSums(), _SparseSums()
        # Of each latent: the activation, and its products with the token's mean layer.
        self._moments = torch.zeros(3, len(self._latents), dtype=torch.float64)

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens."""
        ids, positions = batch.token_ids, batch.position
        self._position_counts = _add_counts(self._position_counts, positions)
        self._token_counts = _add_counts(self._token_counts, ids)
        active, pairs = batch.active, batch.active.by_token
        place, token, layer, value = self._chosen(
            active.latent, active.token, active.layer, active.value
        )
        row = place * active.n_layers + layer
        self._at_positions.add(row, positions[token], value)
        self._at_ids.add(row, ids[token], value)
        place, token, mean, total = self._chosen(
            pairs.latent, pairs.token, pairs.mean_layer, pairs.total
        )
        self._squares_at_positions.add(place, positions[token], total.square())
        self._squares_at_ids.add(place, ids[token], total.square())
        moments = torch.stack([total, total * mean, total * mean.square()])
        self._moments.index_add_(1, place, moments)

    def _chosen(self, latent: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """The places of the chosen latents, and the other entries there."""
        place = self._place[latent]
        chosen = place >= 0
        return tuple(tensor[chosen].cpu() for tensor in (place, *others))

    def compute(self) -> TokenClasses:
        """The sums over all tokens so far."""
        n_layers, n_latents = len(self._hook_names), len(self._latents)
        n_pos = len(self._position_counts)
        row, token_id = self._at_ids.indices()
        total, first, second = self._moments
        between = (second / total - (first / total).square()).clamp(min=0)
        return TokenClasses(
            self._hook_names,
            self._latents,
            self._position_counts,
            self._token_counts,
            self._at_positions.dense(n_latents * n_layers, n_pos).view(
                n_latents, n_layers, n_pos
            ),
            torch.stack([row // n_layers, row % n_layers, token_id]),
            self._at_ids.totals,
            self._squares_at_positions.dense(n_latents, n_pos),
            self._squares_at_ids.indices(),
            self._squares_at_ids.totals,
            between,
        )


class _SparseSums:
    """Sums at pairs of a row and a column, of which few are met."""

    def __init__(self) -> None:
        self._keys = torch.zeros(0, dtype=torch.int64)
        self.totals = torch.zeros(0, dtype=torch.float64)

    def add(self, row: Tensor, column: Tensor, value: Tensor) -> None:
        # Columns are positions or token ids, of which none is as large as 2^32.
        keys = torch.cat([self._keys, row * 2**32 + column])
        self._keys, where = keys.unique(return_inverse=True)
        totals = torch.zeros(len(self._keys), dtype=torch.float64)
        self.totals = totals.index_add_(0, where, torch.cat([self.totals, value]))

    def indices(self) -> Int[Tensor, "2 pair"]:
        """Rows and columns, in order."""
        return torch.stack([self._keys // 2**32, self._keys % 2**32])

    def dense(self, n_rows: int, n_columns: int) -> Float[Tensor, "row column"]:
        dense = torch.zeros(n_rows, n_columns, dtype=torch.float64)
        dense[tuple(self.indices())] = self.totals
        return dense


def token_classes(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "prompt pos"] | ActivationsStore,
    latents: Sequence[int],
    **options: Unpack[PassOptions],
) -> TokenClasses:
    """The distribution over layers of some latents by position, frequency and token.

    Args:
        sae, model, tokens: As in `analyze`.
        latents: The latents to look at.
        options: See `PassOptions`.
    """
    return analyze(sae, model, tokens, TokenClassSums(sae, latents), **options)[0]


def _add_counts(
    counts: Int[Tensor, " n"], values: Int[Tensor, " value"]
) -> Int[Tensor, " more"]:
    more = values.bincount(minlength=len(counts))
    more[: len(counts)] += counts
    return more


def _share_by_chance(
    totals: Float[Tensor, " class"], squares: Float[Tensor, " class"]
) -> float:
    """The share of the variance between tokens that classes get if tokens are shuffled.

    With a weight w for each token, `Var(mean of a class) = s^2 sum w^2 / (sum w)^2` for
    independent tokens of variance s^2, so that the expected variance between classes
    is `s^2 (sum_c sq_c / W_c - sq / W) / W`, and that between tokens
    `s^2 (1 - sq / W^2)`.

    Args:
        totals: W_c, the sum of the weights of each class.
        squares: sq_c, the sum of their squares.
    """
    total, square = totals.sum(), squares.sum()
    classes = ((squares / totals).sum() - square / total) / total
    tokens = 1 - square / total.square()
    return (classes / tokens).item() if tokens > 0 else 0.0
