"""What the browser of latents shows of each."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_multilayer.analysis.distributions import LayerDistributions
from sae_lens_multilayer.analysis.examples import OUTSIDE, Examples
from sae_lens_multilayer.analysis.geometry import TokenSimilarity
from sae_lens_multilayer.pictures.plotly_figures import short_labels


def latents_data(
    distributions: LayerDistributions,
    examples: Examples,
    nearest: TokenSimilarity | None,
    latents: Int[Tensor, " latent"],
    text_of: Callable[[int], str],
    n_examples: int = 8,
) -> dict[str, Any]:
    """Latents as plain values for the page.

    Args:
        nearest: The unembeddings nearest to each decoder direction.
        latents: Which latents, in this order.
        text_of: The text of a token id.
        n_examples: Tokens to show of each; one that is an example at several layers is
            shown once, at the layer with its largest activation.
    """
    texts: dict[int, str] = {}

    def token(token_id: int) -> int:
        texts.setdefault(token_id, text_of(token_id))
        return token_id

    rows = _rows_by_latent(examples)
    probs, mean, std = (
        distributions.probs,
        distributions.mean_layer,
        distributions.std_layer,
    )
    counts, totals = distributions.counts.sum(0), distributions.totals.sum(0)
    found: list[dict[str, Any]] = []
    for latent in latents.tolist():
        top = [] if nearest is None else nearest.token_ids[latent].tolist()
        found.append(
            {
                "id": latent,
                "count": int(counts[latent]),
                "total": _short(totals[latent]),
                "mean": _short(mean[latent]),
                "std": _short(std[latent]),
                "probs": [_short(p) for p in probs[:, latent]],
                "nearest": [token(i) for i in top],
                "examples": [
                    _example(examples, row, token)
                    for row in _top(examples, rows.get(latent, []), n_examples)
                ],
            }
        )
    layers = short_labels(distributions.hook_names)
    return {"layers": layers, "texts": texts, "latents": found}


def _rows_by_latent(examples: Examples) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, latent in enumerate(examples.latents.tolist()):
        rows.setdefault(latent, []).append(row)
    return rows


def _top(examples: Examples, rows: list[int], n: int) -> list[int]:
    by_size = sorted(rows, key=lambda row: -examples.acts[row].item())
    by_place: dict[tuple[int, int], int] = {}
    for row in by_size:
        place = int(examples.prompts[row]), int(examples.positions[row])
        by_place.setdefault(place, row)
    return list(by_place.values())[:n]


def _example(
    examples: Examples, row: int, token: Callable[[int], int]
) -> dict[str, Any]:
    ids = examples.context_ids[row]
    inside = (ids != OUTSIDE).nonzero().squeeze(1)
    return {
        "layer": int(examples.layers[row]),
        "act": _short(examples.acts[row]),
        "prompt": int(examples.prompts[row]),
        "position": int(examples.positions[row]),
        "own": int((inside == examples.n_before).nonzero()[0]),
        "ids": [token(i) for i in ids[inside].tolist()],
        "acts": [_short(a) for a in examples.context_acts[row][inside]],
    }


def _short(value: Tensor) -> float:
    """Four digits are all that is shown."""
    return float(f"{torch.nan_to_num(value).item():.4g}")
