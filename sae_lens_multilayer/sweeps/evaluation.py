"""What is measured of each point of a sweep, and on which text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sae_lens import SAE

from sae_lens_multilayer.analysis.suite import ANALYSES, LENS, SINGLE_LAYERS, Suite
from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.config_files import check_known
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.text.prompts import Prompts, Text

_NOT_IN_SWEEPS = {LENS, SINGLE_LAYERS}
"""Needs that not every point of a sweep meets."""


@dataclass(frozen=True)
class SweepEvaluation:
    """What is measured of each point of a sweep, and on which text."""

    dataset_path: str | None = None
    """Name on the Hugging Face hub, or a file or folder, of held-out text or tokens;
    None if a dataset is given."""
    n_tokens: int = 65_536
    """Tokens of text, in whole prompts: the first ones, the same for all points of a
    model."""
    batch_size_prompts: int = 8
    """Prompts in a forward pass of the model; no result depends on it."""
    exclude_positions: tuple[int, ...] = ()
    """Positions in a prompt that are excluded: 0 if the vectors of the first position
    are many times longer than all others. They keep their own vectors when a layer is
    replaced."""
    analyses: tuple[str, ...] = ("variances", "active_layers", "decoder_similarity")
    """Keys of `analysis.ANALYSES`, beside "evaluation"; the results are saved with each
    point, and the table has the `numbers` of these analyses."""

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "SweepEvaluation":
        """The settings of a file, which may omit some."""
        check_known(settings, [field.name for field in fields(cls)])
        # JSON and YAML have no tuples.
        plain: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()
        }
        return cls(**plain)

    def __post_init__(self) -> None:
        found: Any = self.exclude_positions
        if not isinstance(found, Sequence) or {*map(type, found)} - {int}:
            raise ValueError(
                f"`exclude_positions` must be a list of whole numbers; got {found!r}."
            )
        known = [n for n, row in ANALYSES.items() if not _NOT_IN_SWEEPS & {*row.needs}]
        if unknown := [name for name in self.analyses if name not in known]:
            raise ValueError(f"`analyses` must be among {known}; got {unknown}.")

    def text(self, base: Mapping[str, Any]) -> Text:
        """The held-out text, tokenised as the base of a sweep defines."""
        settings = {"context_size": MultiLayerConfig.context_size, **base}
        return Text.from_settings(settings, dataset_path=self.dataset_path or "")

    def settings(self, text: Text) -> dict[str, Any]:
        """The settings on which results depend."""
        values = {**vars(text), **asdict(self)}
        without_effect = ("batch_size_prompts", "streaming")
        return {n: v for n, v in values.items() if n not in without_effect}


def measure(
    sae: SAE[Any], model: Any, prompts: Prompts, evaluation: SweepEvaluation
) -> dict[str, Result]:
    """Evaluate an SAE and run the analyses; the results by name."""
    suite = Suite(
        sae,
        model,
        prompts,
        batch_size_prompts=evaluation.batch_size_prompts,
        exclude_positions=evaluation.exclude_positions,
    )
    return suite.run(["evaluation", *evaluation.analyses])


def numbers_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Means of the evaluation's metrics over layers, and the analyses' numbers."""
    evaluation = results["evaluation"]
    values = {str(name): float(mean) for name, mean in evaluation.mean().items()}
    for result in results.values():
        values |= result.numbers()
    return {"n_tokens": evaluation.n_tokens, **values}
