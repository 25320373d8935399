"""The inputs that the points of the study share, made once, with their hashes."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE
from sae_lens.config import HfDataset

from sae_lens_multilayer.files import read_json, write_whole
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.record import hash_of_json, model_fingerprints, sae_hash
from sae_lens_multilayer.studies.circuits.same_fvu import (
    TextVectors,
    match_fvu,
    mean_fvu,
    vectors_of_text,
)
from sae_lens_multilayer.studies.circuits.settings import CircuitPoint, CircuitSettings
from sae_lens_multilayer.studies.circuits.streams import (
    Ablation,
    Gradients,
    Streams,
    gradients,
)
from sae_lens_multilayer.studies.circuits.study import chosen_hooks
from sae_lens_multilayer.studies.circuits.tasks import Task, make_task
from sae_lens_multilayer.text.prompts import Text

_SAES_FILE = "saes.json"


@dataclass(frozen=True)
class UsedK:
    """The k with which an SAE is used."""

    k: int
    fvu: float
    """With this k, in raw space, mean over layers."""
    asked_fvu: float | None
    """That of the first SAE; None if it is not matched."""
    k_trained: int


class StudyInputs:
    """Loads or computes the inputs; those that take long are saved in the folder.

    What is saved has a key: the hash of all that it depends on.
    """

    def __init__(
        self,
        settings: CircuitSettings,
        folder: Path,
        model: Any,
        dataset: HfDataset | None,
    ) -> None:
        self._settings, self._folder = settings, folder
        self._given, self._dataset = model, dataset
        first = SAE.load_from_disk(settings.reference, device="cpu")
        self._metadata: Any = first.cfg.metadata
        self.layers = chosen_hooks(first, settings.layers)
        """The hooks of all circuits."""
        self._hashes = {settings.reference: sae_hash(first)}
        self._tasks: dict[tuple[str, int], Task] = {}
        self._last: tuple[Path, Gradients] | None = None

    def fingerprints(self, point: CircuitPoint) -> dict[str, Any]:
        """Hashes of the SAE, the first SAE, and the model if it is loaded or given."""
        is_known = self._given is not None or "model" in vars(self)
        return {
            "sae_hash": self._sae_hash(point.sae),
            "reference_hash": self._sae_hash(self._settings.reference),
            **(self._model_hashes if is_known else {}),
        }

    def _sae_hash(self, path: str) -> str:
        if path not in self._hashes:
            self._hashes[path] = sae_hash(SAE.load_from_disk(path, device="cpu"))
        return self._hashes[path]

    @cached_property
    def _model_hashes(self) -> dict[str, str | None]:
        return model_fingerprints(self.model)

    # Model and prompts

    @cached_property
    def model(self) -> Any:
        """The model given, or that of the settings or of the first SAE."""
        if self._given is not None:
            return self._given
        settings, metadata = self._settings, self._metadata
        return loading.load_by_name(
            settings.model_class_name or metadata.model_class_name,
            settings.model_name or metadata.model_name,
            dict(settings.model_kwargs),
            settings.device,
            list(metadata.hook_names),
        )

    def task(self, point: CircuitPoint) -> Task:
        """The task of a point, with its prompts."""
        key = point.task, point.seed
        if key not in self._tasks:
            tokenizer = as_model(self.model).tokenizer
            bos = bool(self._metadata.prepend_bos)
            n_prompts = self._settings.n_prompts
            self._tasks[key] = make_task(
                point.task, tokenizer, n_prompts, point.seed, bos
            )
        return self._tasks[key]

    # Gradients

    def gradients(self, point: CircuitPoint) -> Gradients:
        """Gradients of a task, which all SAEs share; computed once and saved."""
        settings = self._settings
        how = settings.method, settings.n_steps, self.layers
        inputs = self.task(point).fingerprint, self._model_hashes
        name = f"gradients_{point.task}-{point.seed}_{point.ablation}"
        path = self._folder / f"{name}_{hash_of_json([how, inputs])[:16]}"
        if self._last is None or self._last[0] != path:
            if not path.exists():
                self._compute_gradients(point).save(path)
            self._last = path, Gradients.load(path)
        return self._last[1]

    def _compute_gradients(self, point: CircuitPoint) -> Gradients:
        lm, task, settings = as_model(self.model), self.task(point), self._settings
        streams = Streams.of(lm, task, self.layers, settings.batch_size_prompts)
        options: Any = {name: getattr(settings, name) for name in ("method", "n_steps")}
        options |= {"batch_size_prompts": settings.batch_size_prompts}
        args = lm, task, self.layers, streams
        return gradients(*args, ablation=cast(Ablation, point.ablation), **options)

    # SAEs with equal FVU

    def sae(self, path: str) -> tuple[SAE[Any], UsedK]:
        """An SAE with the k of the study, which is found once and saved."""
        sae = SAE.load_from_disk(path, device=self._settings.device)
        used = self._used_k(path, sae)
        sae.cfg.k = used.k
        return sae, used

    def _used_k(self, path: str, sae: Any) -> UsedK:
        settings, file = self._settings, self._folder / _SAES_FILE
        hashes = [self._sae_hash(one) for one in (path, settings.reference)]
        how = settings.match_fvu, self.layers, self._text.fingerprint
        key = hash_of_json([hashes, how, self._model_hashes])
        known = read_json(file) if file.exists() else {}
        if key in known:
            return UsedK(**known[key])
        used = self._find_k(path, sae)
        known = read_json(file) if file.exists() else {}  # now with the first SAE
        write_whole(file, json.dumps({**known, key: asdict(used)}, indent=1))
        return used

    def _find_k(self, path: str, sae: Any) -> UsedK:
        settings, k, x = self._settings, sae.cfg.k, self._text.vectors
        if not settings.match_fvu:
            return UsedK(k, mean_fvu(sae, x, self.layers), None, k)
        if path == settings.reference:
            fvu = mean_fvu(sae, x, self.layers)
            return UsedK(k, fvu, fvu, k)
        asked = self.sae(settings.reference)[1].fvu
        fvu = match_fvu(sae, x, self.layers, asked)
        return UsedK(sae.cfg.k, fvu, asked, k)

    @cached_property
    def _text(self) -> TextVectors:
        """Vectors of held-out text at positions that count."""
        settings = self._settings
        given = {n: getattr(settings, n) for n in ("dataset_path", "context_size")}
        text = Text.from_settings(self._metadata, **given)
        prompts = text.prompts(self.model, settings.n_tokens, self._dataset)
        lm, size = as_model(self.model), settings.batch_size_prompts
        with torch.no_grad():
            x = vectors_of_text(lm, prompts.ids, self.layers, size)
        counted = prompts.counted.clone()
        counted[:, 0] = False  # an attention sink would be most of the variance
        return TextVectors(x[:, counted], prompts.fingerprint)
