"""The study of interventions of a saved SAE, from a settings file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from sae_lens.config import HfDataset

from sae_lens_multilayer.analysis.nulls import Null
from sae_lens_multilayer.files import remove_folder, remove_leftovers
from sae_lens_multilayer.studies.interventions.result import Interventions
from sae_lens_multilayer.studies.interventions.study import interventions
from sae_lens_multilayer.studies.saved_sae import SavedSAESettings, saved_or_computed
from sae_lens_multilayer.sweeps.cost import measured_in

_OPTIONS = (
    *("alpha", "latents", "n_latents", "n_tokens_of_latent", "n_steps"),
    *("max_edits", "seed", "exclude_positions", "batch_size_prompts", "null"),
)


@dataclass(frozen=True)
class InterventionSettings(SavedSAESettings):
    """What the study edits; see `interventions`. A YAML file holds the same names."""

    kind: ClassVar[str] = "interventions"
    without_effect: ClassVar[tuple[str, ...]] = (
        *SavedSAESettings.without_effect,
        "max_edits",
    )
    alpha: float = 0.0
    """Factor of the activations."""
    latents: Sequence[int] | None = None
    n_latents: int = 200
    n_tokens_of_latent: int = 8
    """Most tokens at which each latent is edited."""
    n_steps: int = 8
    """Steps of integrated gradients."""
    max_edits: int = 64
    seed: int = 0
    null: Null | None = None
    """Analyse a null, to compare with."""


def interventions_study(
    settings: InterventionSettings,
    folder: str | Path,
    *,
    override_model: Any | None = None,
    override_dataset: HfDataset | None = None,
) -> Interventions:
    """Run `interventions`, and save its result and figure in a folder.

    A result that exists is read. An interrupted call is continued after the last prompt
    that it finished. `cost.json` has the time and memory of all calls.

    Args:
        folder: New, or that of an earlier call with the same settings.
        override_model, override_dataset: Used instead of the named ones.

    Raises:
        ValueError: If the folder was made with other settings.
    """
    folder = Path(folder).expanduser()
    settings.check_folder(folder)
    parts = folder / "parts"

    def compute() -> Interventions:
        inputs = settings.inputs(override_model, override_dataset)
        options: Any = {name: getattr(settings, name) for name in _OPTIONS}
        options["n_tokens"] = options.pop("n_tokens_of_latent")
        remove_leftovers(parts)
        with measured_in(folder / "cost.json"):
            return interventions(*inputs, **options, parts=parts)

    result = saved_or_computed(folder / "interventions", Interventions, compute)
    if parts.exists():
        remove_folder(parts)
    return result


def run_settings(settings: dict[str, Any], folder: Path) -> list[pd.DataFrame]:
    """Run the study of a settings file (see `InterventionSettings`)."""
    chosen = InterventionSettings.from_settings(settings)
    result = interventions_study(chosen, folder)
    return [result.summary, result.controls(), result.prediction_table()]
