"""Synthetic residual streams with a layer axis: does the analysis recover the truth?"""

from sae_lens_multilayer.studies.synthetic.arms import ARMS, Arm, Bench, Found
from sae_lens_multilayer.studies.synthetic.config import StreamConfig
from sae_lens_multilayer.studies.synthetic.metrics import recovery
from sae_lens_multilayer.studies.synthetic.results import SyntheticResult
from sae_lens_multilayer.studies.synthetic.source import SyntheticModel, SyntheticSource
from sae_lens_multilayer.studies.synthetic.streams import (
    SyntheticStream,
    SyntheticTokens,
)
from sae_lens_multilayer.studies.synthetic.study import (
    SyntheticSettings,
    run_settings,
    synthetic_study,
)

__all__ = [
    "ARMS",
    "Arm",
    "Bench",
    "Found",
    "StreamConfig",
    "SyntheticModel",
    "SyntheticResult",
    "SyntheticSettings",
    "SyntheticSource",
    "SyntheticStream",
    "SyntheticTokens",
    "recovery",
    "run_settings",
    "synthetic_study",
]
