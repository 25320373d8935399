"""What is measured of each point of a sweep, and on which text."""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from jaxtyping import Int
from sae_lens import SAE
from sae_lens.config import HfDataset
from torch import Tensor

from sae_lens_multilayer.analysis import ANALYSES, Evaluation, Result, Suite
from sae_lens_multilayer.analysis.suite import LENS, SINGLE_LAYERS
from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.config_files import check_known
from sae_lens_multilayer.evaluation.evaluation import SpliceMetrics, evaluate
from sae_lens_multilayer.text.held_out import (
    check_n_tokens,
    excluded_token_ids,
    prompts_of_text,
)
from sae_lens_multilayer.text.prompts import check_integers, check_positions

_OF_TEXT = (
    "context_size",
    "prepend_bos",
    "sequence_separator_token",
    "disable_concat_sequences",
    "is_dataset_tokenized",
    "use_chat_formatting",
    "exclude_special_tokens",
)
"""Settings of a run that say how text becomes prompts."""
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
    has the `numbers` of these analyses."""

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

    def settings(self, text: dict[str, Any]) -> dict[str, Any]:
        """What a result depends on, as values that JSON can hold.

        Args:
            text: See `text_settings`.
        """
        kept = {n: v for n, v in asdict(self).items() if n != "batch_size_prompts"}
        lists = {name: list(kept[name]) for name in ("exclude_positions", "analyses")}
        return {**kept, **lists, **text}


def text_settings(base: Mapping[str, Any]) -> dict[str, Any]:
    """How the base of a sweep makes prompts of text; all points are measured so."""
    return {name: base.get(name, getattr(MultiLayerConfig, name)) for name in _OF_TEXT}


@dataclass(frozen=True)
class HeldOut:
    """The prompts of one model."""

    tokens: Int[Tensor, "prompt pos"]
    """On the CPU."""
    exclude_tokens: list[int]
    """Token ids that are left out."""

    @property
    def fingerprint(self) -> str:
        """Tells other prompts apart."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def held_out(
    model: Any,
    cfg: MultiLayerConfig[Any],
    evaluation: SweepEvaluation,
    text: dict[str, Any],
    dataset: HfDataset | None,
) -> HeldOut:
    """The prompts that all points with a model are measured on.

    Args:
        cfg: One of these points.
        dataset: The text, instead of `evaluation.dataset_path`.

    Raises:
        ValueError: If the text is too short, or a prompt has no such position.
    """
    cfg = copy.copy(cfg)
    for name, value in text.items():
        setattr(cfg, name, value)
    cfg.dataset_path = evaluation.dataset_path or ""
    tokens = prompts_of_text(
        model, cfg, evaluation.n_tokens, evaluation.batch_size_prompts, dataset
    )
    check_positions("exclude_positions", evaluation.exclude_positions, tokens)
    excluded = excluded_token_ids(cfg.exclude_special_tokens, model.tokenizer)
    return HeldOut(tokens, excluded)


def measure(
    sae: SAE[Any], model: Any, data: HeldOut, evaluation: SweepEvaluation
) -> tuple[SpliceMetrics, dict[str, Result]]:
    """Evaluate an SAE and analyse it."""
    options: Any = {
        "batch_size_prompts": evaluation.batch_size_prompts,
        "exclude_tokens": data.exclude_tokens,
        "exclude_positions": evaluation.exclude_positions,
    }
    metrics = evaluate(sae, model, data.tokens, **options)
    suite = Suite(sae, model, data.tokens, **options)
    known = {"evaluation": Evaluation.of(metrics)}
    return metrics, suite.run(evaluation.analyses, known)


def summary(metrics: SpliceMetrics, results: dict[str, Result]) -> dict[str, float]:
    """Means of the metrics over layers, and the numbers of the analyses."""
    values = {str(name): float(value) for name, value in metrics.mean().items()}
    for name, result in results.items():
        if numbers := ANALYSES[name].numbers:
            values |= numbers(result)
    return values
