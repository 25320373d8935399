"""How far a latent's layers move if the token, its context or its position changes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.nulls import NULL_TITLES
from sae_lens_multilayer.analysis.stream import PassOptions, analyze
from sae_lens_multilayer.pictures.description import Axis, Panel, Picture, Series
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.studies.intervals import ratio_intervals
from sae_lens_multilayer.text.prompts import Prompts, Tokens, take_prompts

FACTORS = ("token", "context", "position")
_N_CELLS = 2 ** len(FACTORS)


@dataclass
class TokenSwaps(Result):
    """Wasserstein distances between `P(l | j, t)` at two tokens t, in layers.

    Items are pairs of texts, of which eight prompts are made: the last token, the
    context and the position are each of one text or the other (2 x 2 x 2). Distances
    are means over the latents that are active in both of two prompts, weighted by their
    activation, and over the four pairs of prompts of an item that differ in the same
    factors.
    """

    hook_names: list[str]
    null: str
    """The null that was analysed, or ""."""
    n_context: int
    """Tokens of a context."""
    shift: int
    """Positions between the two positions."""
    distances: Float[Tensor, "item change"]
    """Bit i of the index of a change is factor i: 0 changes nothing, 7 all."""
    by_chance: Float[Tensor, "item change"]
    """Distances between different latents that are active in both prompts; NaN where
    fewer than two are."""
    shared: Float[Tensor, "item change"]
    """Share of the activation in both prompts by latents that are active in both."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each set of changed factors.

        `distance` with the 95% interval `low` to `high` (resampled items), `by_chance`
        and `shared` as above. `effect` is the factorial effect: for one factor the mean
        distance with it changed minus that without; for several their interaction.
        """
        contrasts = torch.from_numpy(_contrasts())
        columns = {"distance": self.distances}
        columns |= {"by_chance": self.by_chance, "shared": self.shared}
        columns["effect"] = self.distances @ contrasts.T
        table = pd.DataFrame({n: v.nanmean(0).numpy() for n, v in columns.items()})
        for name in ("distance", "effect"):
            of_items = enumerate(columns[name].numpy().T)
            means = {str(i): (v, np.isfinite(v).astype(float)) for i, v in of_items}
            found = ratio_intervals(means)
            table[f"{name}_low"] = found["low"].to_numpy()
            table[f"{name}_high"] = found["high"].to_numpy()
        names = [" x ".join(_factors(change)) for change in range(_N_CELLS)]
        return table.set_index(pd.Index(names, name="changed")).iloc[1:]

    def numbers(self) -> dict[str, float]:
        distance = self.to_dataframe()["distance"]
        return {f"swap_{name}": float(distance.at[name]) for name in FACTORS}

    def pictures(self, **context: Any) -> dict[str, Picture]:
        table = self.to_dataframe()
        changed, x = Axis("changed", list(table.index)), range(len(table))

        def column(name: str) -> np.ndarray:
            return table[name].to_numpy()

        def bars(name: str) -> list[Series]:
            low, high = column(f"{name}_low"), column(f"{name}_high")
            return [
                Series(name, x, column(name), "bars"),
                Series("95% interval", x, low, "intervals", high),
            ]

        by_chance = column("by_chance")
        chance = Series("between different latents", x, by_chance, "points")
        distance = Axis("Wasserstein distance (layers)", include_zero=True)
        panels = [
            Panel(changed, distance, [*bars("distance"), chance]),
            Panel(changed, Axis("factorial effect (layers)"), bars("effect")),
        ]
        caption = (
            f"{len(self.distances)} pairs of texts, contexts of {self.n_context} "
            f"tokens, positions {self.shift} apart. Latents that are active in both "
            f"prompts have {table.shared.iloc[0]:.0%} of the activation if the token "
            f"changes, {table.shared.iloc[1]:.0%} if the context does."
        )
        title = f"Layers of a latent after a swap{NULL_TITLES[self.null]}"
        return {"": Picture(title, panels, caption)}


def token_swaps(
    sae: SAE[Any],
    model: Any,
    tokens: Tokens,
    *,
    n_items: int = 64,
    n_context: int = 32,
    shift: int = 16,
    seed: int = 0,
    **options: Unpack[PassOptions],
) -> TokenSwaps:
    """Swap tokens, contexts and positions between texts; see `TokenSwaps`.

    A first token that all prompts have is kept at position 0. Later positions follow
    `shift` tokens of a third prompt, put before the context.

    Args:
        tokens: The texts, of at least three prompts.
        n_items: Pairs of texts; each takes eight prompts of
            `1 + n_context + shift + 1` tokens.
        seed: Of the choice of the texts.
    """
    null, size = options.get("null"), options.get("batch_size_prompts", 8)
    source = take_prompts(
        model,
        tokens,
        options.get("n_prompts"),
        size,
        options.get("exclude_tokens"),
        options.get("exclude_positions", ()),
    )
    prompts = swapped_prompts(source, n_items, n_context, shift, seed)
    call: Any = (sae, model, prompts, _SwapSums(seed))
    parts = analyze(*call, batch_size_prompts=size, null=null)[0]
    return TokenSwaps(hook_names_of(sae), null or "", n_context, shift, *parts)


def swapped_prompts(
    source: Prompts, n_items: int, n_context: int, shift: int, seed: int
) -> Prompts:
    """Eight prompts for each item, of which only the swapped token counts.

    Bit i of a prompt's index within its item is factor i: whether the token, the
    context or the position is the second one. Shorter prompts end with other tokens.
    """
    ids, counted = source.ids.cpu(), source.counted.cpu()
    n_prompts, n_pos = ids.shape
    start = int((ids[:, 0] == ids[0, 0]).all())
    if n_prompts < 3 or n_pos < max(n_context + 1, shift) + start:
        raise ValueError(
            f"Swaps need at least 3 prompts of n_context + {1 + start} tokens (got "
            f"{n_prompts} of {n_pos}, n_context {n_context}) and of `shift` tokens "
            f"(got {shift}). Give more or longer prompts."
        )
    rng = np.random.default_rng(seed)
    rows: list[Tensor] = []
    for _ in range(n_items):
        texts = _draw_texts(ids, counted, start + n_context, rng)
        rows += _cells(ids, texts, start, n_context, shift)
    swapped = torch.stack(rows)
    target = torch.tensor([start + n_context, start + n_context + shift])
    position = target[(torch.arange(len(swapped)) % _N_CELLS) >> 2]
    return Prompts(swapped, torch.arange(swapped.shape[1]) == position.unsqueeze(1))


def _draw_texts(
    ids: Tensor, counted: Tensor, first: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Prompt and position of two different tokens that count, and a third prompt."""
    prompt, position = (t.numpy() for t in counted[:, first:].nonzero(as_tuple=True))
    for _ in range(1000):
        if not len(prompt):
            break
        a, b = rng.integers(0, len(prompt), 2)
        texts = [(int(prompt[i]), int(position[i]) + first) for i in (a, b)]
        if prompt[a] != prompt[b] and ids[texts[0]] != ids[texts[1]]:
            others = set(range(len(ids))) - {int(prompt[a]), int(prompt[b])}
            return [*texts, (int(rng.choice(sorted(others))), 0)]
    raise ValueError(
        "Swaps need two prompts with different tokens that count after position "
        f"{first - 1}; found none. Give more prompts, or a smaller `n_context`."
    )


def _cells(
    ids: Tensor, texts: list[tuple[int, int]], start: int, n_context: int, shift: int
) -> list[Tensor]:
    (a, b, (other, _)) = texts
    begin, filler = ids[0, :start], ids[other, start : start + shift]
    contexts = [ids[p, pos - n_context : pos] for p, pos in (a, b)]
    tokens = [ids[p, pos : pos + 1] for p, pos in (a, b)]
    cells: list[Tensor] = []
    for cell in range(_N_CELLS):
        text = [contexts[cell >> 1 & 1], tokens[cell & 1]]
        parts = [filler, *text] if cell >> 2 else [*text, filler]
        cells.append(torch.cat([begin, *parts]))
    return cells


class _SwapSums:
    """Compares the tokens of each item."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._tokens: list[_TokenLayers] = []

    def update(self, batch: TokenBatch) -> None:
        found = batch.active.by_token
        probs = found.total.new_zeros(len(found.total), batch.active.n_layers)
        share = batch.active.value / found.total[found.pair]
        probs.index_put_((found.pair, batch.active.layer), share)
        cdf, token = probs.cumsum(1).cpu().numpy(), found.token.cpu()
        latent, total = found.latent.cpu().numpy(), found.total.cpu().numpy()
        ends = np.cumsum(token.bincount(minlength=batch.active.n_tokens).numpy())
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            own = slice(start, end)
            self._tokens.append(_TokenLayers(latent[own], total[own], cdf[own]))

    def compute(self) -> tuple[Tensor, ...]:
        n_items = len(self._tokens) // _N_CELLS
        # Of eight prompts, four pairs differ in the same factors.
        found = torch.full((3, n_items, _N_CELLS, _N_CELLS // 2), torch.nan).double()
        for item in range(n_items):
            tokens = self._tokens[item * _N_CELLS : (item + 1) * _N_CELLS]
            for change in range(1, _N_CELLS):
                firsts = [cell for cell in range(_N_CELLS) if cell < cell ^ change]
                for i, cell in enumerate(firsts):
                    pair = tokens[cell], tokens[cell ^ change]
                    compared = torch.tensor(_compare(*pair, self._rng))
                    found[:, item, change, i] = compared
        found[:, :, 0] = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)
        return tuple(found.nanmean(-1))


@dataclass
class _TokenLayers:
    """The latents of a token, in order, with their activations and layers."""

    latent: Int[np.ndarray, " latent"]
    total: Float[np.ndarray, " latent"]
    cdf: Float[np.ndarray, "latent layer"]
    """Cumulative `P(l | j, t)`."""


def _compare(
    a: _TokenLayers, b: _TokenLayers, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Mean distance of the same and of different latents, and their share.

    NaN without a latent that is active at both tokens, and without a second one.
    """
    _, in_a, in_b = np.intersect1d(a.latent, b.latent, True, return_indices=True)
    if not len(in_a):
        return np.nan, np.nan, 0.0
    weight = a.total[in_a] + b.total[in_b]
    shared = float(weight.sum() / (a.total.sum() + b.total.sum()))

    def mean_distance(others: np.ndarray) -> float:
        moved = np.abs(a.cdf[in_a] - b.cdf[others]).sum(1)
        return float(np.average(moved, weights=weight))

    if len(in_b) == 1:
        return mean_distance(in_b), np.nan, shared
    other = np.roll(in_b, rng.integers(1, len(in_b)))
    return mean_distance(in_b), mean_distance(other), shared


def _factors(change: int) -> list[str]:
    return [name for i, name in enumerate(FACTORS) if change >> i & 1]


def _contrasts() -> Float[np.ndarray, "effect change"]:
    """Rows of a 2 x 2 x 2 design: the effect of each set of factors."""
    cells = np.arange(_N_CELLS)
    rows: list[np.ndarray] = []
    for effect in cells:
        n_unchanged = [bin(effect & ~cell).count("1") for cell in cells]
        rows.append(np.where(np.array(n_unchanged) % 2, -1.0, 1.0) / (_N_CELLS // 2))
    return np.stack(rows)
