"""What the contestants share: settings of runs, vectors, the model and the prompts."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.config import HfDataset
from torch import Tensor

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.config_files import mapping
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.store.cache import ActivationCache
from sae_lens_multilayer.store.source import CacheSource, ModelSource, Source
from sae_lens_multilayer.studies.comparison.residuals import (
    Prediction,
    ResidualSource,
    first_vectors,
)
from sae_lens_multilayer.studies.comparison.settings import ComparisonSettings
from sae_lens_multilayer.sweeps.points import make_points
from sae_lens_multilayer.sweeps.sweep import train_in
from sae_lens_multilayer.text.prompts import Prompts, take_prompts
from sae_lens_multilayer.training.run import hooks_of_run

_N_RATED = 4_096
"""Held-out tokens after which no batch is added to curves of rate and distortion."""


class ComparisonData:
    """The settings, and what is loaded once, when it is needed."""

    def __init__(
        self,
        settings: ComparisonSettings,
        model: Any | None,
        dataset: HfDataset | None,
        held_out: HfDataset | None,
    ) -> None:
        """Validate the settings; no model is loaded. See `comparison_study`."""
        self.settings = settings
        self.dataset, self._held_out = dataset, held_out
        if model is not None:
            self.model = model  # instead of the cached property
        self._shape = None if model is None else as_model(model).shape
        self.cfg = self.config({})
        self.hook_names = self._find_hooks()
        if (settings.evaluation.dataset_path is None) == (held_out is None):
            raise ValueError(
                "For held-out text, give `dataset_path` of `evaluation` or a dataset, "
                "and not both."
            )
        d_in = self.cfg.sae.d_in
        if not settings.n_fit_tokens > d_in:
            raise ValueError(
                f"`n_fit_tokens` must be more than `d_in` = {d_in}, or the vectors are "
                f"fitted exactly; got {settings.n_fit_tokens}."
            )

    def config(self, changes: Mapping[str, Any]) -> MultiLayerConfig[Any]:
        """The config of a run: the base with some changes."""
        point = {"name": "run", **changes}
        return make_points(self.settings.base, [point], self._shape)[0].cfg

    def _find_hooks(self) -> list[str]:
        shape = self._shape or loading.shape_by_name(*self.cfg.named_model)
        names = hooks_of_run(self.cfg, shape or as_model(self.model).shape)
        if len(names) < 2:
            raise ValueError(f"Give two or more layers to compare; got {names}.")
        return names

    @cached_property
    def model(self) -> Any:
        """The model, loaded when it is needed."""
        cfg = self.cfg
        return loading.load_by_name(*cfg.named_model, cfg.llm_device, self.hook_names)

    @cached_property
    def prompts(self) -> Prompts:
        """The held-out prompts."""
        chosen = self.settings.evaluation
        text = chosen.text(self.settings.base)
        prompts = text.prompts(self.model, chosen.n_tokens, self._held_out)
        excluded = chosen.exclude_positions
        size = chosen.batch_size_prompts
        taken = take_prompts(
            self.model, prompts, None, size, exclude_positions=excluded
        )
        return Prompts(taken.ids, taken.counted & prompts.counted)

    @cached_property
    @torch.no_grad()
    def held_out(self) -> Float[Tensor, "token layer d_in"]:
        """The vectors of held-out tokens, for curves of rate and distortion."""
        parts: list[Tensor] = []
        n_tokens = 0
        for batch in self.prompts.split(self.settings.evaluation.batch_size_prompts):
            vectors = as_model(self.model).vectors(batch.ids, self.hook_names)
            parts.append(torch.stack([v[batch.counted].float() for v in vectors], 1))
            n_tokens += len(parts[-1])
            if n_tokens >= _N_RATED:
                break
        return torch.cat(parts).to(self.cfg.device)

    def source(self, cfg: MultiLayerConfig[Any], hook_names: list[str]) -> Source:
        """The vectors that all contestants train on, at some hooks."""
        if cfg.use_cached_activations:
            assert cfg.cached_activations_path is not None  # checked by the config
            cache = ActivationCache(cfg.cached_activations_path)
            return CacheSource.from_config(cache, hook_names, cfg)
        return ModelSource.from_config(self.model, hook_names, cfg, self.dataset)


class OwnBench:
    """Trains the SAEs of a point in its folder."""

    def __init__(self, data: ComparisonData, folder: Path, seed: int) -> None:
        """Train in subfolders of a folder."""
        self.hook_names = data.hook_names
        self._data, self._folder, self._seed = data, folder, seed

    @property
    def fitted_on(self) -> Float[Tensor, "token layer d_in"]:
        return self._first_vectors

    @cached_property
    def _first_vectors(self) -> Float[Tensor, "token layer d_in"]:
        data = self._data
        source = data.source(self._config({}), self.hook_names)
        x = first_vectors(source, data.settings.n_fit_tokens)
        return x.to(data.cfg.device)

    def _config(self, changes: Mapping[str, Any]) -> MultiLayerConfig[Any]:
        return self._data.config({"seed": self._seed, **changes})

    def train(
        self,
        name: str,
        sae: Mapping[str, Any],
        hook_names: list[str] | None = None,
        prediction: Prediction | None = None,
    ) -> SAE[Any]:
        data, folder = self._data, self._folder / name
        if not (folder / "sae").is_dir():
            names = hook_names or self.hook_names
            own = names if prediction is None else names[1:]
            hooks = {"layers": None, "hook_names": own}
            cfg = self._config({**hooks, **self._fitting(sae)})
            source = None
            if prediction is not None:
                source = ResidualSource(data.source(cfg, names), prediction)
            train_in(folder, cfg, data.model, data.dataset, source)
        return SAE.load_from_disk(folder / "sae", device=data.cfg.device)

    def _fitting(self, sae: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, with `k_aux` of the base at most `d_sae`."""
        base = self._data.settings.base
        k_aux = {**mapping(base, "sae"), **base}.get("k_aux")
        if k_aux is None:
            return dict(sae)
        return {**sae, "k_aux": min(k_aux, sae["d_sae"])}
