"""Data of the latent browser, as plain values in pieces that a page reads singly."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Shaped

from sae_lens_multilayer.analysis.coactive import CoactiveLatents
from sae_lens_multilayer.analysis.direct_logits import OutputTokens
from sae_lens_multilayer.analysis.distributions import LayerDistributions
from sae_lens_multilayer.analysis.examples import Examples
from sae_lens_multilayer.analysis.geometry import DecoderSimilarity
from sae_lens_multilayer.analysis.histograms import ActHistograms
from sae_lens_multilayer.pictures.description import short_labels
from sae_lens_multilayer.pictures.example_data import sampled, shorten, strongest
from sae_lens_multilayer.results import Result

PIECE = 64
"""Latents of a piece, which the page unpacks when one of them is opened."""

NEEDED = ("layer_distributions", "max_activating_examples")
"""Analyses without whose results there are no latents to show."""
USED = (
    *NEEDED,
    *("sampled_examples", "act_histograms", "coactive_latents"),
    *("output_tokens", "decoder_similarity"),
)
"""Analyses whose results are shown."""


@dataclass
class LatentData:
    """What the page reads at once, and the latents themselves."""

    head: dict[str, Any] = field(
        default_factory=lambda: {"layers": [], "index": {"id": []}, "texts": {}}
    )
    """Labels of the layers; columns of the list of latents; texts of token ids."""
    latents: list[dict[str, Any]] = field(default_factory=list)
    """Each latent's own data, in the order of the list."""

    @property
    def pieces(self) -> list[list[dict[str, Any]]]:
        """The latents in groups of `PIECE`."""
        starts = range(0, len(self.latents), PIECE)
        return [self.latents[start : start + PIECE] for start in starts]


def latents_data(
    results: Mapping[str, Result],
    n_latents: int,
    more: Sequence[int],
    text_of: Callable[[int], str],
) -> LatentData:
    """Statistics, examples, output tokens and neighbours of latents.

    Results that are missing are left out; see `NEEDED`. The other arguments are as in
    `ReportContent`.
    """
    dists = results.get("layer_distributions")
    examples = results.get("max_activating_examples")
    if not (isinstance(dists, LayerDistributions) and isinstance(examples, Examples)):
        return LatentData()
    chosen = list(dict.fromkeys([*dists.most_active(n_latents).tolist(), *more]))
    parts = {
        **_layers(dists, chosen),
        **_neighbours(results, chosen),
        **_outputs(results.get("output_tokens"), chosen),
        **_histograms(results.get("act_histograms"), chosen),
        "examples": strongest(examples, chosen),
        "samples": sampled(results.get("sampled_examples"), chosen),
    }
    latents = [
        {"id": latent, **{name: values[i] for name, values in parts.items()}}
        for i, latent in enumerate(chosen)
    ]
    outputs = results.get("output_tokens")
    rows = outputs.rows if isinstance(outputs, OutputTokens) else []
    head = {
        "layers": short_labels(dists.hook_names),
        "outputs": [row.removeprefix("layer_") for row in rows],
        "d_sae": dists.counts.shape[1],
        "n_tokens": dists.n_tokens,
        "piece": PIECE,
        "index": _index(dists, latents),
        "texts": {str(i): text_of(i) for i in sorted(_token_ids(latents))},
    }
    return LatentData(head, latents)


def _index(
    dists: LayerDistributions, latents: list[dict[str, Any]]
) -> dict[str, list[Any]]:
    """Columns of the list of latents."""
    chosen = [latent["id"] for latent in latents]
    columns = {
        "count": dists.counts.sum(0),
        "total": dists.totals.sum(0),
        "mean": dists.mean_layer,
        "std": dists.std_layer,
    }
    own = [
        list(dict.fromkeys(e["ids"][e["own"]] for e in latent["examples"]))
        for latent in latents
    ]
    values = {n: shorten(column[chosen].numpy()) for n, column in columns.items()}
    return {"id": chosen, **values, "own": own}


def _layers(dists: LayerDistributions, chosen: list[int]) -> dict[str, list[Any]]:
    return {
        "probs": shorten(dists.probs[:, chosen].T.numpy()),
        "counts": dists.counts[:, chosen].T.tolist(),
    }


def _neighbours(
    results: Mapping[str, Result], chosen: list[int]
) -> dict[str, list[Any]]:
    """Other latents with a number each: cosine similarity, or Jaccard index."""
    found: dict[str, list[Any]] = {}
    similar = results.get("decoder_similarity")
    if isinstance(similar, DecoderSimilarity):
        values = similar.latents[chosen], similar.cos_sim[chosen]
        found["similar"] = _pairs(*(v.float().numpy() for v in values))
    active = results.get("coactive_latents")
    if isinstance(active, CoactiveLatents):
        values = active.latents[chosen], active.jaccard[chosen], active.both[chosen]
        pairs = _pairs(*(v.double().numpy() for v in values))
        found["coactive"] = [[p for p in some if p[2] > 0] for some in pairs]
    return found


def _outputs(result: Result | None, chosen: list[int]) -> dict[str, list[Any]]:
    """Of each latent, the top and the bottom tokens of each row."""
    if not isinstance(result, OutputTokens):
        return {}
    top = [
        _pairs(ids[chosen].numpy(), logits[chosen].float().numpy())
        for ids, logits in zip(result.top_ids, result.top_logits, strict=True)
    ]
    bottom = [
        _pairs(ids[chosen].numpy(), logits[chosen].float().numpy())
        for ids, logits in zip(result.bottom_ids, result.bottom_logits, strict=True)
    ]
    return {
        "top": [list(rows) for rows in zip(*top, strict=True)],
        "bottom": [list(rows) for rows in zip(*bottom, strict=True)],
    }


def _histograms(result: Result | None, chosen: list[int]) -> dict[str, list[Any]]:
    if not isinstance(result, ActHistograms):
        return {}
    counts = result.counts[:, chosen].transpose(0, 1)
    return {"width": result.widths[chosen].tolist(), "histogram": counts.tolist()}


def _pairs(*columns: Shaped[np.ndarray, "latent n"]) -> list[list[list[Any]]]:
    """Of each latent, one list for each of n: a whole number, then short ones."""
    first, *rest = columns
    lists = [first.astype(int).tolist(), *map(shorten, rest)]
    return [
        [list(one) for one in zip(*of_latent, strict=True)]
        for of_latent in zip(*lists, strict=True)
    ]


def _token_ids(latents: Iterable[dict[str, Any]]) -> set[int]:
    ids: set[int] = set()
    for latent in latents:
        for example in (*latent["examples"], *latent["samples"]):
            ids.update(example["ids"])
        for side in ("top", "bottom"):
            for row in latent.get(side, []):
                ids.update(token for token, _ in row)
    return ids
