"""Data of the latent browser, as plain values."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sae_lens_multilayer.analysis.distributions import LayerDistributions
from sae_lens_multilayer.analysis.examples import OUTSIDE, Examples
from sae_lens_multilayer.analysis.geometry import TokenSimilarity
from sae_lens_multilayer.pictures.description import short_labels
from sae_lens_multilayer.results import Result

_N_EXAMPLES = 8
"""Largest activations to show of each latent."""


def latents_data(
    results: Mapping[str, Result],
    n_latents: int,
    more: list[int],
    text_of: Callable[[int], str],
) -> dict[str, Any]:
    """Statistics, largest activations and nearest unembeddings of latents.

    Args:
        results: Results of the suite by name. Without the layer distributions and the
            examples there are no latents; without `token_unembeddings` none are near.
        n_latents: Latents to include: those with the largest sums of activations.
        more: Latents to include in any case.
        text_of: The text of a token id.
    """
    distributions = results.get("layer_distributions")
    examples = results.get("max_activating_examples")
    nearest = results.get("token_unembeddings")
    found: dict[str, Any] = {"layers": [], "texts": {}, "latents": []}
    if isinstance(distributions, LayerDistributions) and isinstance(examples, Examples):
        found["layers"] = short_labels(distributions.hook_names)
        chosen = dict.fromkeys([*distributions.most_active(n_latents).tolist(), *more])
        latents = _statistics(distributions, list(chosen))
        rows = _rows_by_latent(examples)
        for latent in latents:
            top = _top(examples, rows.get(latent["id"], []))
            latent["examples"] = [_example(examples, row) for row in top]
            latent["nearest"] = (
                nearest.token_ids[latent["id"]].tolist()
                if isinstance(nearest, TokenSimilarity)
                else []
            )
        found["latents"] = latents
        found["texts"] = {i: text_of(i) for i in sorted(_token_ids(latents))}
    return found


def _statistics(
    distributions: LayerDistributions, latents: list[int]
) -> list[dict[str, Any]]:
    counts, totals = distributions.counts.sum(0), distributions.totals.sum(0)
    probs, mean = distributions.probs, distributions.mean_layer
    std = distributions.std_layer
    return [
        {
            "id": latent,
            "count": int(counts[latent]),
            "total": _short(totals[latent]),
            "mean": _short(mean[latent]),
            "std": _short(std[latent]),
            "probs": [_short(p) for p in probs[:, latent]],
        }
        for latent in latents
    ]


def _token_ids(latents: list[dict[str, Any]]) -> set[int]:
    nearest = {i for latent in latents for i in latent["nearest"]}
    examples = (example for latent in latents for example in latent["examples"])
    return nearest.union(*(example["ids"] for example in examples))


def _rows_by_latent(examples: Examples) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, latent in enumerate(examples.latents.tolist()):
        rows.setdefault(latent, []).append(row)
    return rows


def _top(examples: Examples, rows: list[int]) -> list[int]:
    """The rows with the largest activations, each token once."""
    by_size = sorted(rows, key=lambda row: -examples.acts[row].item())
    by_token: dict[tuple[int, int], int] = {}
    for row in by_size:
        token = int(examples.prompts[row]), int(examples.positions[row])
        by_token.setdefault(token, row)
    return list(by_token.values())[:_N_EXAMPLES]


def _example(examples: Examples, row: int) -> dict[str, Any]:
    ids = examples.context_ids[row]
    inside = (ids != OUTSIDE).nonzero().squeeze(1)
    return {
        "layer": int(examples.layers[row]),
        "act": _short(examples.acts[row]),
        "prompt": int(examples.prompts[row]),
        "position": int(examples.positions[row]),
        "own": int((inside == examples.n_before).nonzero()[0]),
        "ids": ids[inside].tolist(),
        "acts": [_short(a) for a in examples.context_acts[row][inside]],
    }


def _short(value: Tensor) -> float:
    """A number with the four digits that are shown; 0 for NaN."""
    return float(f"{torch.nan_to_num(value).item():.4g}")
