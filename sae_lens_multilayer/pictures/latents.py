"""Data of the latent browser, as plain values."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

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

    There are no latents without the layer distributions and the examples in `results`.
    The other arguments are as in `ReportContent`.
    """
    dists = results.get("layer_distributions")
    examples = results.get("max_activating_examples")
    nearest = results.get("token_unembeddings")
    if not (isinstance(dists, LayerDistributions) and isinstance(examples, Examples)):
        return {"layers": [], "texts": {}, "latents": []}
    chosen = dict.fromkeys([*dists.most_active(n_latents).tolist(), *more])
    latents = _statistics(dists, list(chosen))
    rows = _rows_by_latent(examples)
    ids: set[int] = set()
    for latent in latents:
        top = _top(examples, rows.get(latent["id"], []))
        latent["examples"] = [_example(examples, row) for row in top]
        latent["nearest"] = []
        if isinstance(nearest, TokenSimilarity):
            latent["nearest"] = nearest.token_ids[latent["id"]].tolist()
        ids.update(latent["nearest"], *(e["ids"] for e in latent["examples"]))
    texts = {i: text_of(i) for i in sorted(ids)}
    layers = short_labels(dists.hook_names)
    return {"layers": layers, "texts": texts, "latents": latents}


def _statistics(dists: LayerDistributions, latents: list[int]) -> list[dict[str, Any]]:
    counts, totals = dists.counts.sum(0), dists.totals.sum(0)
    probs, mean, std = dists.probs, dists.mean_layer, dists.std_layer
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


def _rows_by_latent(examples: Examples) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, latent in enumerate(examples.latents.tolist()):
        rows.setdefault(latent, []).append(row)
    return rows


def _top(examples: Examples, rows: list[int]) -> list[int]:
    """The rows with the largest activations, each token once."""
    by_token: dict[tuple[int, int], int] = {}
    for row in sorted(rows, key=lambda row: -examples.acts[row].item()):
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


def _short(value: torch.Tensor) -> float:
    """A number with the four digits that are shown; 0 for NaN."""
    return float(f"{torch.nan_to_num(value).item():.4g}")
