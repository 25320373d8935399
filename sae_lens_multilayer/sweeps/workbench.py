"""The model and the held-out prompts of a sweep's points: loaded when needed, once."""

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_lens.config import HfDataset

from sae_lens_multilayer.config import fields_of
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.sweeps.evaluation import SweepEvaluation
from sae_lens_multilayer.sweeps.points import Point
from sae_lens_multilayer.text.prompts import Prompts, check_positions
from sae_lens_multilayer.text.text import Text
from sae_lens_multilayer.training.lens_of_run import lens_of_run

_OF_MODEL = fields_of("model", "model run")
"""Points that agree in these fields share a loaded model."""


@dataclass(frozen=True)
class Given:
    """Objects that are used instead of what the settings name."""

    model: Any | None = None
    dataset: HfDataset | None = None
    """To train on."""
    evaluation_dataset: HfDataset | None = None
    """Held-out text or tokens."""


class Workbench:
    """What points are run with; those that come one after the other share a model."""

    def __init__(
        self,
        points: Sequence[Point],
        evaluation: SweepEvaluation,
        text: Text,
        given: Given,
    ) -> None:
        """Check that models, layers and data fit together; no model is loaded.

        Args:
            points: All that will be run.
            evaluation: On which text they are measured.
            text: The held-out text.
            given: What need not be loaded.

        Raises:
            ValueError: If a point does not fit its model, or there is no data.
            OSError: If data is not there.
        """
        self._points, self._evaluation, self._text = points, evaluation, text
        self.given = given
        self._current: str | None = None
        self._model: Any = given.model
        self._held_out: Prompts | None = None
        self._check_data()
        self._check_models()

    def _check_data(self) -> None:
        path, given = self._evaluation.dataset_path, self.given
        if (path is None) == (given.evaluation_dataset is None):
            raise ValueError(
                "Points are measured on held-out text: give `dataset_path` of "
                "`evaluation`, or a dataset to `sweep`, and not both."
            )
        texts = [] if path is None else [self._text]
        if given.dataset is None:
            texts += [Text.from_config(point.cfg) for point in self._points]
        for number, text in enumerate(texts):
            if text not in texts[:number]:
                text.load_dataset()

    def _check_models(self) -> None:
        given = self.given.model
        if given is not None and len(set(map(model_of, self._points))) > 1:
            raise ValueError(
                f"All points must be of the model that was given; {_OF_MODEL} must "
                "not vary. Sweep over models by name."
            )
        shape = None if given is None else as_model(given).shape
        for point in self._points:
            lens = lens_of_run(point.cfg)
            if shape is None:
                loading.check_named_model(point.cfg, lens)
            else:
                loading.check_shape(point.cfg, shape, lens)

    def load(self, point: Point) -> tuple[Any, Prompts]:
        """The model of a point and its held-out prompts, the same for all its points.

        Raises:
            ValueError: If the text is too short, or an excluded position is not in a
                prompt.
        """
        if self._current != model_of(point):
            self._current = self._held_out = None
            if self.given.model is None:
                self._model = None
                gc.collect()  # before the next one takes its place
                self._model = loading.load_model(point.cfg, self._hook_names(point))
            self._current = model_of(point)
        if self._held_out is None:
            n_tokens = self._evaluation.n_tokens
            dataset = self.given.evaluation_dataset
            prompts = self._text.prompts(self._model, n_tokens, dataset)
            excluded = self._evaluation.exclude_positions
            check_positions("exclude_positions", excluded, prompts.ids)
            self._held_out = prompts
        return self._model, self._held_out

    def _hook_names(self, point: Point) -> list[str] | None:
        """The hooks of all points with the model of this one; None if unknown.

        A Hugging Face model has only the hooks that it is loaded with.
        """
        shape = loading.named_shape(point.cfg)
        if shape is None:
            return None
        alike = [p for p in self._points if model_of(p) == model_of(point)]
        names = [n for p in alike for n in p.cfg.resolve_hook_names(shape.n_layers)]
        return list(dict.fromkeys(names))


def model_of(point: Point) -> str:
    """Tells points of the same model from others."""
    return json.dumps([getattr(point.cfg, name) for name in _OF_MODEL])
