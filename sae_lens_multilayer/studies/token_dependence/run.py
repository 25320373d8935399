"""The whole study of a saved SAE, with its nulls, figures and tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from sae_lens import SAE
from sae_lens.config import HfDataset

from sae_lens_multilayer.config_files import check_known
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.pictures import draw, save_figure
from sae_lens_multilayer.record import Record, as_lines
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.studies.token_dependence.result import (
    NULL_TITLES,
    TokenDependence,
)
from sae_lens_multilayer.studies.token_dependence.study import layer_dependence
from sae_lens_multilayer.studies.token_dependence.swaps import TokenSwaps, token_swaps
from sae_lens_multilayer.text.prompts import Prompts, Text

KIND = "token_dependence"
T = TypeVar("T", bound=Result)


@dataclass(frozen=True)
class TokenDependenceSettings:
    """What the study measures; a YAML file holds the same names."""

    sae: str
    """Folder of a saved SAE."""
    dataset_path: str
    """Held-out text: a name on the Hugging Face hub, or a file or folder."""
    n_tokens: int = 4_096
    """Tokens of text, in whole prompts."""
    context_size: int | None = None
    """Tokens in a prompt; None: as in training."""
    exclude_positions: Sequence[int] = (0,)
    """Positions in a prompt that are excluded."""
    nulls: Sequence[str] = tuple(name for name in NULL_TITLES if name)
    """Nulls to compare with."""
    latents: Sequence[int] | None = None
    """Latents of `layer_dependence`; None: all."""
    n_resamples: int = 200
    """Resamples and permutations of `layer_dependence`."""
    swaps: Mapping[str, int] = field(default_factory=dict[str, int])
    """`n_items`, `n_context` and `shift` of `token_swaps`."""
    model_name: str | None = None
    """Name or folder of the model; None: as in training."""
    model_class_name: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Arguments for loading the model; those in the SAE's metadata are not used."""
    batch_size_prompts: int = 8
    device: str = "cpu"

    def record(self) -> Record:
        """The settings on which results depend."""
        without_effect = ("batch_size_prompts", "device", "nulls")
        values = asdict(self).items()
        return Record(KIND, {n: v for n, v in values if n not in without_effect})


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
    _check_folder(folder, settings)
    inputs = _inputs(settings, override_model, override_dataset)
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
        study.dependence[null] = _saved(
            own / "layer_dependence", TokenDependence, lambda f=dependence: f(*inputs)
        )
        study.swaps[null] = _saved(
            own / "token_swaps", TokenSwaps, lambda f=swaps: f(*inputs)
        )
    return study


def run_settings(settings: dict[str, Any], folder: Path) -> list[pd.DataFrame]:
    """Run the study of a settings file (see `TokenDependenceSettings`)."""
    check_known(settings, [one.name for one in fields(TokenDependenceSettings)])
    missing = [name for name in ("sae", "dataset_path") if not settings.get(name)]
    if missing:
        raise ValueError(f"The study needs an SAE and its text; {missing} is missing.")
    return token_dependence_study(TokenDependenceSettings(**settings), folder).tables()


def _check_folder(folder: Path, settings: TokenDependenceSettings) -> None:
    record = settings.record()
    if folder.exists():
        if differences := Record.read(folder, KIND).differences(record):
            raise ValueError(
                f"{folder} holds a study with other settings:{as_lines(differences)}"
            )
    else:
        folder.mkdir(parents=True)
        record.write(folder)


def _inputs(
    settings: TokenDependenceSettings, model: Any, dataset: HfDataset | None
) -> tuple[SAE[Any], Any, Prompts]:
    """The SAE, the model and the prompts of the settings."""
    sae = SAE.load_from_disk(settings.sae, device=settings.device)
    metadata = sae.cfg.metadata
    text = Text.from_settings(
        metadata,
        dataset_path=settings.dataset_path,
        context_size=settings.context_size,
    )
    if model is None:
        model = loading.load_by_name(
            settings.model_class_name
            or metadata.model_class_name
            or "HookedTransformer",
            settings.model_name or metadata.model_name,
            dict(settings.model_kwargs),
            settings.device,
            hook_names_of(sae),
        )
    return sae, model, text.prompts(model, settings.n_tokens, dataset)


def _saved(path: Path, kind: type[T], compute: Callable[[], T]) -> T:
    """Read a result, or compute and save it with its figure."""
    if path.exists():
        return kind.load(path)
    result = compute()
    path.parent.mkdir(exist_ok=True)
    save_figure(draw(result), path.with_suffix(".png"))
    result.save(path)
    return result
