"""What is measured of each point of a sweep, and on which text."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sae_lens import SAE

from sae_lens_multilayer.analysis import ANALYSES
from sae_lens_multilayer.analysis.suite import LENS, SINGLE_LAYERS, Suite
from sae_lens_multilayer.config import fields_of
from sae_lens_multilayer.config_files import check_known
from sae_lens_multilayer.evaluation.evaluation import evaluate
from sae_lens_multilayer.evaluation.metrics import SpliceMetrics
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.text.prompts import Prompts, check_integers
from sae_lens_multilayer.text.text import Text, check_n_tokens

_NOT_IN_SWEEPS = {LENS, SINGLE_LAYERS}
"""Needs that no point of a sweep or not every point meets."""


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
    """Positions in a prompt that are left out: 0 where the vectors of the first
    position are many times longer than all others. They keep their own vectors when a
    layer is replaced."""
    analyses: tuple[str, ...] = (
        "variances",
        "active_layers",
        "decoder_similarity",
    )
    """Keys of `analysis.ANALYSES`; the results are saved with each point, and the table
    has their `Result.numbers`."""

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "SweepEvaluation":
        """The settings of a file.

        Raises:
            ValueError: If one is unknown or wrong.
        """
        check_known(settings, [field.name for field in fields(cls)])
        # A file has lists.
        plain: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()
        }
        return cls(**plain)

    def __post_init__(self) -> None:
        check_n_tokens(self.n_tokens)
        if self.batch_size_prompts < 1:
            raise ValueError(
                f"`batch_size_prompts` must be at least 1; got "
                f"{self.batch_size_prompts}."
            )
        check_integers("exclude_positions", self.exclude_positions)
        known = [n for n, row in ANALYSES.items() if not _NOT_IN_SWEEPS & {*row.needs}]
        if unknown := [name for name in self.analyses if name not in known]:
            raise ValueError(f"`analyses` must be among {known}; got {unknown}.")

    def text(self, base: Mapping[str, Any]) -> Text:
        """The held-out text, made to prompts as the base of a sweep does."""
        return Text.from_settings(base, self.dataset_path or "")

    def settings(self, text: Text) -> dict[str, Any]:
        """The settings that a result depends on, as values that JSON can hold."""
        kept = {n: v for n, v in asdict(self).items() if n != "batch_size_prompts"}
        lists = {name: list(kept[name]) for name in ("exclude_positions", "analyses")}
        of_text = {name: getattr(text, name) for name in fields_of("text")}
        return {**of_text, "seqpos_slice": list(text.seqpos_slice), **kept, **lists}


def measure(
    sae: SAE[Any], model: Any, prompts: Prompts, evaluation: SweepEvaluation
) -> tuple[SpliceMetrics, dict[str, Result]]:
    """Evaluate an SAE and analyse it."""
    options: Any = {
        "batch_size_prompts": evaluation.batch_size_prompts,
        "exclude_positions": evaluation.exclude_positions,
    }
    metrics = evaluate(sae, model, prompts, **options)
    suite = Suite(sae, model, prompts, **options)
    return metrics, suite.run(evaluation.analyses, {"evaluation": metrics})


def summary(metrics: SpliceMetrics, results: dict[str, Result]) -> dict[str, float]:
    """Means of the metrics over layers, and the numbers of the analyses."""
    values = {str(name): float(value) for name, value in metrics.mean().items()}
    for result in results.values():
        values |= result.numbers()
    return values
