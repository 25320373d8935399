"""Interventions: what happens downstream if a latent is ablated, scaled or added."""

from sae_lens_multilayer.evaluation.edits import LatentEdit
from sae_lens_multilayer.studies.interventions.edited_runs import (
    EditedRun,
    ablate,
    run_edits,
    scale,
    steer,
)

__all__ = ["EditedRun", "LatentEdit", "ablate", "run_edits", "scale", "steer"]
