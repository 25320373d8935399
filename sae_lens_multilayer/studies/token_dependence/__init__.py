"""What the layers of a latent depend on: token, context, position, other latents."""

from sae_lens_multilayer.studies.token_dependence.result import TokenDependence
from sae_lens_multilayer.studies.token_dependence.run import (
    TokenDependenceSettings,
    TokenDependenceStudy,
    run_settings,
    token_dependence_study,
)
from sae_lens_multilayer.studies.token_dependence.study import layer_dependence
from sae_lens_multilayer.studies.token_dependence.swaps import TokenSwaps, token_swaps

__all__ = [
    "TokenDependence",
    "TokenDependenceSettings",
    "TokenDependenceStudy",
    "TokenSwaps",
    "layer_dependence",
    "run_settings",
    "token_dependence_study",
    "token_swaps",
]
