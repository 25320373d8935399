"""Settings of a comparison, and its points."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from sae_lens_multilayer.config_files import check_known, mapping
from sae_lens_multilayer.sae.config import ARCHITECTURE, check_sizes
from sae_lens_multilayer.studies.comparison.contestants import (
    CONTESTANTS,
    MLSAE,
    Matching,
)
from sae_lens_multilayer.sweeps.evaluation import SweepEvaluation
from sae_lens_multilayer.sweeps.points import Settings


@dataclass(frozen=True)
class ComparisonSettings:
    """What is trained and measured; a YAML file has the same names."""

    base: Settings
    """Settings of the run of the MLSAE, as in `sweep`, which the others share. `layers`
    are those compared; `d_sae` (or `expansion_factor`) and `k` are the MLSAE's."""
    contestants: Sequence[str] = (MLSAE, "single_layers")
    """Names in `CONTESTANTS`."""
    matchings: Sequence[str] = ("operations",)
    """What is equal to the MLSAE's: "operations", "parameters", "bits"; a contestant is
    trained at each, see `Contestant.size`."""
    seeds: Sequence[int] = ()
    """Seeds of training; intervals are over them. Empty: that of `base`."""
    matched_bits_per_value: int = 4
    """q in the matching of bits."""
    budgets: Sequence[int | float] = (256, 512, 1024)
    """Bits per token at which FVU is reported."""
    bits_per_value: Sequence[int] = (2, 3, 4, 6)
    """Each q of the curves of rate and distortion."""
    n_fit_tokens: int = 8_192
    """Training tokens to which PCA and predictions are fitted in closed form, more than
    `d_in` of them; quantisers are fitted to at most 1,024."""
    evaluation: SweepEvaluation = field(default_factory=SweepEvaluation)
    """Held-out text. Its analyses are not run."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "ComparisonSettings":
        """The settings of a file, which may omit all but `base`."""
        check_known([*settings], [one.name for one in fields(cls)])
        evaluation = SweepEvaluation.from_settings(mapping(settings, "evaluation"))
        base = mapping(settings, "base")
        values: dict[str, Any] = {**settings, "base": base, "evaluation": evaluation}
        return cls(**values)

    def __post_init__(self) -> None:
        known = {"contestants": [*CONTESTANTS], "matchings": [*get_args(Matching)]}
        for name, choices in known.items():
            given: Any = getattr(self, name)
            is_list = isinstance(given, (list, tuple)) and given
            if not is_list or [one for one in given if one not in choices]:
                raise ValueError(
                    f"`{name}` must be a list with some of {choices}; got {given!r}."
                )
        if "bits" in self.matchings and MLSAE not in self.contestants:
            raise ValueError(
                f"`matchings` with 'bits' needs {MLSAE!r} among `contestants`, whose "
                f"bits are measured; got {list(self.contestants)}."
            )
        check_sizes(self, ["matched_bits_per_value", "n_fit_tokens"])
        sae = {**mapping(self.base, "sae"), **self.base}
        if sae.get("architecture", ARCHITECTURE) != ARCHITECTURE:
            raise ValueError(
                f"`base` must have the architecture {ARCHITECTURE!r}, with which the "
                f"others are matched; got {sae['architecture']!r}."
            )


@dataclass(frozen=True)
class Entry:
    """A contestant with a seed and a matching."""

    seed: int
    contestant: str
    matching: str | None
    """None: the MLSAE, which is the same in all matchings."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        matching = "" if self.matching is None else f"_{self.matching}"
        return f"seed{self.seed}_{self.contestant}{matching}"


def entries(settings: ComparisonSettings, seeds: Sequence[int]) -> list[Entry]:
    """All points: the MLSAEs first, as others may need their bits; then by matching."""
    mlsaes = [Entry(s, MLSAE, None) for s in seeds if MLSAE in settings.contestants]
    others = [
        Entry(seed, contestant, matching)
        for matching in settings.matchings
        for contestant in settings.contestants
        for seed in seeds
        if contestant != MLSAE
    ]
    return [*mlsaes, *others]
