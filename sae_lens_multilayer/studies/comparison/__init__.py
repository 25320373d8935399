"""Contestants for seeing all layers, trained on the same vectors and compared."""

from sae_lens_multilayer.studies.comparison.bits import Quantiser
from sae_lens_multilayer.studies.comparison.codecs import Codec
from sae_lens_multilayer.studies.comparison.contestants import (
    CONTESTANTS,
    Contestant,
    Size,
)
from sae_lens_multilayer.studies.comparison.result import ComparisonResult
from sae_lens_multilayer.studies.comparison.settings import ComparisonSettings
from sae_lens_multilayer.studies.comparison.study import (
    comparison_study,
    run_settings,
)

__all__ = [
    "CONTESTANTS",
    "Codec",
    "ComparisonResult",
    "ComparisonSettings",
    "Contestant",
    "Quantiser",
    "Size",
    "comparison_study",
    "run_settings",
]
