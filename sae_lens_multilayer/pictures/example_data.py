"""Examples of latents as plain values for the page."""

from typing import Any

import numpy as np
from jaxtyping import Shaped

from sae_lens_multilayer.analysis.examples import OUTSIDE, Examples
from sae_lens_multilayer.results import Result

N_STRONGEST = 8
"""Largest activations to show of each latent."""
N_PARTS = 5
"""Parts of equal size into which a sample is divided by activation."""
N_OF_PART = 2
"""Examples to show of each part."""


def strongest(examples: Examples, latents: list[int]) -> list[list[dict[str, Any]]]:
    """The largest activations of each latent over all layers, each token once."""
    arrays = {n: getattr(examples, n).numpy() for n in ("latents", "acts")}
    order = np.lexsort((-arrays["acts"], arrays["latents"]))
    token = np.stack(
        [getattr(examples, n).numpy() for n in ("latents", "prompts", "positions")]
    )
    # The first of each token has its largest activation.
    _, first = np.unique(token[:, order], axis=1, return_index=True)
    rows = _by_latent(arrays["latents"], order[np.sort(first)])
    return _as_values(examples, [rows.get(j, [])[:N_STRONGEST] for j in latents])


def sampled(result: Result | None, latents: list[int]) -> list[list[dict[str, Any]]]:
    """Examples from each part of a sample of each latent, the largest first.

    Each has the share of the sample with larger activations, in `above`.
    """
    if not isinstance(result, Examples):
        return [[] for _ in latents]
    acts, of = result.acts.numpy(), result.latents.numpy()
    rows = _by_latent(of, np.lexsort((-acts, of)))
    chosen: list[list[int]] = []
    shares: list[list[float]] = []
    for latent in latents:
        own = rows.get(latent, [])
        ranks = _spread(len(own))
        chosen.append([own[rank] for rank in ranks])
        shares.append([rank / len(own) for rank in ranks])
    values = _as_values(result, chosen)
    for some, above in zip(values, shares, strict=True):
        for value, share in zip(some, above, strict=True):
            value["above"] = round(share, 3)
    return values


def _spread(n: int) -> list[int]:
    """Ranks below n: some of each part, evenly spaced; all if there are few."""
    n_wanted = N_PARTS * N_OF_PART
    if n <= n_wanted:
        return list(range(n))
    return [int((i + 0.5) * n / n_wanted) for i in range(n_wanted)]


def _by_latent(latents: Shaped[np.ndarray, " row"], order: Any) -> dict[int, list[int]]:
    """Rows of each latent, in this order."""
    rows: dict[int, list[int]] = {}
    for row, latent in zip(order.tolist(), latents[order].tolist(), strict=True):
        rows.setdefault(latent, []).append(row)
    return rows


def _as_values(examples: Examples, rows: list[list[int]]) -> list[list[dict[str, Any]]]:
    """Lists of examples, from lists of rows."""
    flat = [row for some in rows for row in some]
    columns = {
        "layer": examples.layers[flat].tolist(),
        "act": shorten(examples.acts[flat].numpy()),
        "prompt": examples.prompts[flat].tolist(),
        "position": examples.positions[flat].tolist(),
        "ids": examples.context_ids[flat].tolist(),
        "acts": shorten(examples.context_acts[flat].numpy()),
        "layer_acts": shorten(examples.layer_acts[flat].numpy()),
    }
    made = [
        _example(dict(zip(columns, values, strict=True)), examples.n_before)
        for values in zip(*columns.values(), strict=True)
    ]
    found = iter(made)
    return [[next(found) for _ in some] for some in rows]


def _example(values: dict[str, Any], n_before: int) -> dict[str, Any]:
    """Without what is outside of the prompt; activations as pairs (index, value)."""
    inside = [i for i, token in enumerate(values["ids"]) if token != OUTSIDE]
    acts = [values["acts"][i] for i in inside]
    return {
        **values,
        "own": inside.index(n_before),
        "ids": [values["ids"][i] for i in inside],
        "acts": _nonzero(acts),
        "layer_acts": _nonzero(values["layer_acts"]),
    }


def _nonzero(values: list[Any]) -> list[list[Any]]:
    return [[i, value] for i, value in enumerate(values) if value]


def shorten(values: Shaped[np.ndarray, "..."]) -> list[Any]:
    """Numbers with the four digits that are shown, and 0 for NaN."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float64))
    size = np.abs(np.where(values == 0, 1, values))
    n_decimals = np.clip(3 - np.floor(np.log10(size)), 0, 15)
    scale = 10.0**n_decimals
    rounded = np.round(values * scale) / scale
    whole = rounded == np.round(rounded)
    if whole.all() and np.abs(rounded).max(initial=0) < 2**53:
        return rounded.astype(np.int64).tolist()
    return rounded.tolist()
