"""Circuits of SAEs and prompts with different seeds compared."""

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.studies.circuits.result import Circuits, jaccard
from sae_lens_multilayer.studies.circuits.settings import CircuitPoint


def compare_seeds(
    found: Mapping[CircuitPoint, Circuits], share: float
) -> list[dict[str, Any]]:
    """The Jaccard index of the nodes of circuits that differ in one seed.

    Circuits of two SAEs are compared by latents that stand for each other: those whose
    decoder rows are nearest both ways.

    Args:
        share: Kept share of the nodes of the compared circuits.
    """
    rows: list[dict[str, Any]] = []
    matching = cache(_matching)  # of all tasks, ablations and seeds
    for a, b in _pairs(found):
        latent_of = None if a.sae == b.sae else matching(a.sae, b.sae)
        value = jaccard(found[a].nodes(share), found[b].nodes(share), latent_of)
        keys = {name: getattr(a, name) for name in ("label", "task", "ablation")}
        between = "prompts" if a.sae == b.sae else "SAEs"
        rows.append({**keys, "between": between, "jaccard": value})
    return rows


def _pairs(
    points: Mapping[CircuitPoint, Circuits],
) -> Iterator[tuple[CircuitPoint, CircuitPoint]]:
    for a, b in combinations(points, 2):
        same = (a.label, a.task, a.ablation) == (b.label, b.task, b.ablation)
        if same and (a.index != b.index) + (a.seed != b.seed) == 1:
            yield a, b


def _matching(a: str, b: str) -> Int[np.ndarray, " latent"]:
    rows = [SAE.load_from_disk(path).W_dec.detach() for path in (a, b)]
    return mutual_nearest(rows[0], rows[1])


def mutual_nearest(
    a: Float[Tensor, "latent d_in"],
    b: Float[Tensor, "other d_in"],
    n_at_once: int = 1024,
) -> Int[np.ndarray, " other"]:
    """The latent of `a` for each of `b` with which it is nearest both ways; else -2.

    Nearness is the cosine; of equally near latents, the first one counts.

    Args:
        n_at_once: Rows of `b` whose cosines with all of `a` are in memory at once.
    """
    a, b = (torch.nn.functional.normalize(one, dim=1) for one in (a, b))
    of_b = torch.empty(len(b), dtype=torch.int64, device=b.device)
    of_a = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    nearest = torch.full_like(a[:, 0], -torch.inf)
    for start in range(0, len(b), n_at_once):
        rows = slice(start, start + n_at_once)
        cosines = a @ b[rows].T
        of_b[rows] = cosines.argmax(0)
        found = cosines.max(1)
        is_nearer = found.values > nearest
        of_a = torch.where(is_nearer, found.indices + start, of_a)
        nearest = torch.where(is_nearer, found.values, nearest)
    is_mutual = of_a[of_b] == torch.arange(len(b), device=b.device)
    return torch.where(is_mutual, of_b, -2).cpu().numpy()
