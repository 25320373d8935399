"""How much of a latent's layer is a shift that all latents of a token share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.active import check_are_active, check_latents
from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.stream import PassOptions, analyze
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.studies.token_dependence.predictors import (
    TokenPredictors,
    TokenPredictorSums,
)
from sae_lens_multilayer.studies.token_dependence.result import TokenDependence
from sae_lens_multilayer.studies.token_dependence.shares import (
    leave_one_out_mean,
    lmg_shares,
    permuted_within,
    resampled_prompts,
)
from sae_lens_multilayer.studies.token_dependence.two_way import (
    HalvesFit,
    Pairs,
    shared_shift,
)
from sae_lens_multilayer.text.prompts import Tokens


def layer_dependence(
    sae: SAE[Any],
    model: Any,
    tokens: Tokens,
    *,
    latents: Sequence[int] | None = None,
    n_resamples: int = 200,
    seed: int = 0,
    **options: Unpack[PassOptions],
) -> TokenDependence:
    """Measure how the layers of latents depend on the token; see `TokenDependence`.

    Memory is 32 bytes for each latent that is active at each token (about 9 kB a token
    for 300 latents), and some times this during the fit.

    Args:
        latents: The latents to measure; None: all.
        n_resamples: Resamples of the prompts, and permutations of the shifts.
        seed: Of the halves of the latents, the resamples and the permutations.

    Raises:
        ValueError: If the SAE has one layer, a latent in `latents` is never active, or
            fewer than two latents are.
    """
    names = hook_names_of(sae)
    if len(names) < 2:
        raise ValueError(
            f"The SAE must have at least two layers, or no layer depends on the token; "
            f"it has {names}."
        )
    sums = PairSums(sae, latents), TokenPredictorSums(sae, model)
    pairs, predictors = analyze(sae, model, tokens, *sums, **options)
    null = options.get("null") or ""
    return _measure(names, null, pairs, predictors, n_resamples, seed)


class PairSums:
    """Collects `E[L | j, t]` of each latent and token, weighted by its activation."""

    def __init__(self, sae: SAE[Any], latents: Sequence[int] | None = None) -> None:
        if latents is not None:
            check_latents(latents, sae.cfg.d_sae)
        self._latents, self._decoder = latents, sae.W_dec.detach()
        self._n_tokens, self._n_latents = 0, sae.cfg.d_sae
        self._batches: list[tuple[Tensor, ...]] = []

    def update(self, batch: TokenBatch) -> None:
        found = batch.active.by_token
        token = found.token + self._n_tokens
        parts = (token, found.latent, found.total, found.mean_layer)
        self._batches.append(tuple(part.cpu() for part in parts))
        self._n_tokens += len(batch.x)

    def compute(self) -> Pairs:
        parts = (torch.cat(p) for p in zip(*self._batches, strict=True))
        pairs = Pairs(self._n_tokens, self._n_latents, *parts)
        counts = pairs.latent.bincount(minlength=self._n_latents)
        if self._latents is not None:
            check_are_active(self._latents, counts, self._decoder)
            pairs = pairs.of(torch.isin(pairs.latent, torch.tensor(self._latents)))
        n_active = len(pairs.latent.unique())
        if n_active < 2:
            raise ValueError(
                "At least two latents must be active, as each half of them predicts "
                f"the other; {n_active} of {self._n_latents} is. Give more of them."
            )
        return pairs


def _measure(
    names: list[str],
    null: str,
    pairs: Pairs,
    found: TokenPredictors,
    n_resamples: int,
    seed: int,
) -> TokenDependence:
    # Latents that are never active would make the halves unequal.
    used, pairs.latent = pairs.latent.unique(return_inverse=True)
    pairs.n_latents = len(used)
    shift, halves = shared_shift(pairs), HalvesFit.of(pairs, seed)
    mean = pairs.sum_by_token(pairs.y) / pairs.token_weight
    regression = _Regression(found, shift, pairs.token_weight)
    rng = np.random.default_rng(seed)
    permuted = [regression.permuted_shares(rng) for _ in range(n_resamples)]
    resampled = [
        regression.shares(times)
        for times in resampled_prompts(regression.prompt, n_resamples, rng)
    ]
    return TokenDependence(
        hook_names=names,
        null=null,
        n_latents=pairs.n_latents,
        predictor_names=regression.names,
        prompts=found.prompt,
        positions=found.position,
        token_ids=found.token_id,
        weights=pairs.token_weight,
        token_means=mean.nan_to_num(),
        shifts=shift,
        half_shifts=halves.shifts,
        squares=torch.stack([halves.total, pairs.squares(shift), halves.left]),
        predictors=torch.from_numpy(regression.all_values),
        shares=torch.from_numpy(regression.shares()),
        resampled_shares=torch.from_numpy(np.stack(resampled)),
        permuted_shares=torch.from_numpy(np.stack(permuted)),
    )


class _Regression:
    """Predicts the shifts of tokens; those whose surprisal is not defined are left out.

    `identity` and `previous_identity` are the mean shift of the other tokens with the
    same id, and with the same previous id.
    """

    def __init__(
        self, found: TokenPredictors, shift: Float[Tensor, " token"], weight: Tensor
    ) -> None:
        columns = torch.stack(list(found.values.values())).numpy()
        self._kept = np.isfinite(columns).all(0) & (weight.numpy() > 0)
        if self._kept.sum() < 2:
            raise ValueError(
                "At least two tokens must follow another one in a prompt, as shifts "
                "are compared with the surprisal of the token. Give longer prompts."
            )
        self._columns = columns[:, self._kept]
        self._ids = found.token_id.numpy()[self._kept]
        self._previous = found.previous_id.numpy()[self._kept]
        self._shift, self._weight = (
            shift.numpy()[self._kept],
            weight.numpy()[self._kept],
        )
        self.prompt = found.prompt.numpy()[self._kept]
        self.names = [*found.values, "identity", "previous_identity"]
        own = self._with_identities(self._shift, self._weight)
        self.all_values = np.full((len(own), len(self._kept)), np.nan)
        self.all_values[:, self._kept] = own
        self._own = own

    def _with_identities(self, shift: np.ndarray, weight: np.ndarray) -> np.ndarray:
        means = [
            leave_one_out_mean(ids, shift, weight)
            for ids in (self._ids, self._previous)
        ]
        return np.vstack([self._columns, *means])

    def shares(self, times: np.ndarray | None = None) -> np.ndarray:
        """Shares with each token counted some times."""
        weight = self._weight if times is None else self._weight * times
        return lmg_shares(self._own, self._shift, weight)

    def permuted_shares(self, rng: np.random.Generator) -> np.ndarray:
        """Shares if the shifts of each prompt are in random order."""
        order = permuted_within(self.prompt, rng)
        shift, weight = self._shift[order], self._weight[order]
        return lmg_shares(self._with_identities(shift, weight), shift, weight)
