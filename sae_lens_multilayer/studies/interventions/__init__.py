"""Interventions: what happens downstream if a latent is ablated, scaled or added."""

from sae_lens_multilayer.evaluation.edits import LatentEdit
from sae_lens_multilayer.studies.interventions.edited_runs import (
    EditedRun,
    ablate,
    run_edits,
    scale,
    steer,
)
from sae_lens_multilayer.studies.interventions.result import Interventions
from sae_lens_multilayer.studies.interventions.run import (
    InterventionSettings,
    interventions_study,
    run_settings,
)
from sae_lens_multilayer.studies.interventions.study import interventions

__all__ = [
    "EditedRun",
    "InterventionSettings",
    "Interventions",
    "LatentEdit",
    "ablate",
    "interventions",
    "interventions_study",
    "run_edits",
    "run_settings",
    "scale",
    "steer",
]
