"""The whole study of a saved SAE, with its nulls, figures and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from sae_lens.config import HfDataset

from sae_lens_multilayer.analysis.nulls import NULL_TITLES
from sae_lens_multilayer.studies.saved_sae import SavedSAESettings, saved_or_computed
from sae_lens_multilayer.studies.token_dependence.result import TokenDependence
from sae_lens_multilayer.studies.token_dependence.study import layer_dependence
from sae_lens_multilayer.studies.token_dependence.swaps import TokenSwaps, token_swaps


@dataclass(frozen=True)
class TokenDependenceSettings(SavedSAESettings):
    """What the study measures; a YAML file holds the same names."""

    kind: ClassVar[str] = "token_dependence"
    without_effect: ClassVar[tuple[str, ...]] = (
        *SavedSAESettings.without_effect,
        "nulls",
    )
    nulls: Sequence[str] = tuple(name for name in NULL_TITLES if name)
    """Nulls to compare with."""
    latents: Sequence[int] | None = None
    """Latents of `layer_dependence`; None: all."""
    n_resamples: int = 200
    """Resamples and permutations of `layer_dependence`."""
    swaps: Mapping[str, int] = field(default_factory=dict[str, int])
    """`n_items`, `n_context` and `shift` of `token_swaps`."""


@dataclass
class TokenDependenceStudy:
    """Results of the trained model (""), and of each null by its name."""

    dependence: dict[str, TokenDependence]
    swaps: dict[str, TokenSwaps]

    def tables(self) -> list[pd.DataFrame]:
        """Numbers of the shift, shares of its predictors, and distances of swaps."""

        def side_by_side(tables: dict[str, pd.Series]) -> pd.DataFrame:
            return pd.DataFrame({n or "trained": t for n, t in tables.items()})

        found, swaps = self.dependence.items(), self.swaps.items()
        return [
            side_by_side({n: r.summary["value"] for n, r in found}),
            side_by_side({n: r.to_dataframe()["share"] for n, r in found}),
            side_by_side({n: r.to_dataframe()["distance"] for n, r in swaps}),
        ]


def token_dependence_study(
    settings: TokenDependenceSettings,
    folder: str | Path,
    *,
    override_model: Any | None = None,
    override_dataset: HfDataset | None = None,
) -> TokenDependenceStudy:
    """Run `layer_dependence` and `token_swaps` for a model and its nulls.

    Results are in a folder each, with their figures; those that exist are not computed
    again.

    Args:
        folder: New, or that of an earlier call with the same settings.
        override_model, override_dataset: Used instead of the named ones.

    Raises:
        ValueError: If the folder was made with other settings.
    """
    folder = Path(folder).expanduser()
    settings.check_folder(folder)
    # Only if a result is missing.
    inputs = cache(partial(settings.inputs, override_model, override_dataset))
    study = TokenDependenceStudy({}, {})
    for null in ("", *settings.nulls):
        options: Any = {
            "exclude_positions": settings.exclude_positions,
            "batch_size_prompts": settings.batch_size_prompts,
            "null": null or None,
        }
        dependence = partial(
            layer_dependence,
            latents=settings.latents,
            n_resamples=settings.n_resamples,
            **options,
        )
        swaps: Any = partial(token_swaps, **settings.swaps, **options)
        own = folder / (null or "trained")
        study.dependence[null] = saved_or_computed(
            own / "layer_dependence", TokenDependence, lambda f=dependence: f(*inputs())
        )
        study.swaps[null] = saved_or_computed(
            own / "token_swaps", TokenSwaps, lambda f=swaps: f(*inputs())
        )
    return study


def run_settings(settings: dict[str, Any], folder: Path) -> list[pd.DataFrame]:
    """Run the study of a settings file (see `TokenDependenceSettings`)."""
    chosen = TokenDependenceSettings.from_settings(settings)
    return token_dependence_study(chosen, folder).tables()
