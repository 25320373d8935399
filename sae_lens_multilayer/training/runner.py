"""The runner: model, store, SAE, trainer and checkpoints put together."""

import json
import logging
import math
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    LanguageModelSAETrainingRunner,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.config import HfDataset
from sae_lens.constants import (
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import DataProvider
from sae_lens.util import temporary_seed
from safetensors.torch import save_file
from typing_extensions import override

from sae_lens_multilayer.config import MultiLayerConfig, fields_of
from sae_lens_multilayer.files import (
    check_writable,
    complete_or_absent,
    free_path,
    read_json,
    read_tensors,
)
from sae_lens_multilayer.lens.carrier import LensCarrier
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.ranks import AgreedError
from sae_lens_multilayer.record import Record, as_lines, model_fingerprints
from sae_lens_multilayer.store.source import CacheSource, ModelSource
from sae_lens_multilayer.store.store import MultiLayerActivationsStore
from sae_lens_multilayer.training import trainer_state
from sae_lens_multilayer.training.batches import RunBatches
from sae_lens_multilayer.training.evaluator import MultiLayerEvaluator
from sae_lens_multilayer.training.run_cache import cache_of_run, evaluates
from sae_lens_multilayer.training.run_folder import (
    CHECKPOINT_KIND,
    check_checkpoint,
    comparable_settings,
    resolve_latest,
)
from sae_lens_multilayer.training.run_lens import (
    check_lens_of_model,
    lens_of_run,
)
from sae_lens_multilayer.training.run_ranks import (
    check_number_of_ranks,
    folder_of_rank,
    join_ranks,
    load_random_states,
    state_of_rank,
    write_states,
)
from sae_lens_multilayer.training.trainer import MultiLayerTrainer

logger = logging.getLogger(__name__)

_KNOWN_TO_ALL_RANKS = (AgreedError, InterruptedException, FloatingPointError)
"""Errors that all ranks raise at one place; a loss is the same on all."""


class MultiLayerSAETrainingRunner(LanguageModelSAETrainingRunner):
    """Trains one SAE on the activation vectors of many layers.

    `sae_lens.SAETrainingRunner(cfg)` becomes this when `cfg` is a `MultiLayerConfig`.
    """

    cfg: MultiLayerConfig[Any]
    model: Any
    """None in a run from a cache that does not evaluate."""
    activations_store: MultiLayerActivationsStore
    evaluator: MultiLayerEvaluator  # type: ignore[assignment]
    _states: Sequence[bytes] = ()
    """What differs between ranks and goes into the next checkpoint, by rank."""

    def __init__(
        self,
        cfg: MultiLayerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: Any | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ) -> None:
        """Load what the run needs and check that it fits together.

        Args:
            cfg: The run.
            override_dataset: Used instead of `cfg.dataset_path`; a run from a cache
                reads neither.
            override_model: Used instead of loading `cfg.model_name`.
            override_sae: Trained on instead of a new SAE.

        Raises:
            ValueError: If the settings do not fit the model, the data or each other.
            OSError: If a place to save to cannot be written.
        """
        given: Any = cfg
        if not isinstance(given, MultiLayerConfig):
            raise ValueError(
                "`cfg` must be a MultiLayerConfig; for other configs use SAELens' "
                f"LanguageModelSAETrainingRunner. Got {type(given).__name__}."
            )
        self.ranks, cfg = join_ranks(cfg)
        cfg = self._agree_on_folders(cfg)
        # Narrower than the host's, which are these in every run of ours.
        self.cfg = cfg  # pyright: ignore[reportIncompatibleVariableOverride]
        with self.ranks.together():
            self._check_places()
        self._cache = cache_of_run(cfg, self.ranks)
        if override_sae is not None:
            self._check_given_sae(override_sae)
        self._lens = lens_of_run(cfg, override_sae)
        self.model = self._load_model(override_model)
        # Compiling the model, which comes next, changes the names of its weights.
        self._fingerprints = (
            {} if self.model is None else model_fingerprints(self.model)
        )
        store = self._make_store(override_dataset)
        self.activations_store = store  # pyright: ignore[reportIncompatibleVariableOverride]
        self._check_hooks_of_checkpoint(store.hook_names)
        self._starts_anew = override_sae is None and cfg.from_pretrained_path is None
        self.sae = override_sae if override_sae is not None else self._make_sae()
        self._check_normalization(self.sae)
        check_lens_of_model(self.sae, self.model, self._cache)
        self.sae.to(cfg.device)
        # Not a subclass of the host's, but called as that is.
        self.evaluator = MultiLayerEvaluator(  # pyright: ignore[reportIncompatibleVariableOverride]
            self.model,
            store,
            n_batches=cfg.n_eval_batches,
            batch_size_prompts=cfg.eval_batch_size_prompts
            or cfg.store_batch_size_prompts,
        )

    def _agree_on_folders(self, cfg: MultiLayerConfig[Any]) -> MultiLayerConfig[Any]:
        """Let all ranks have the first's checkpoint, and its run's folder."""
        with self.ranks.together():
            cfg = resolve_latest(cfg) if self.ranks.is_first else cfg
        if not self.ranks.is_alone:
            cfg.resume_from_checkpoint, cfg.checkpoint_path = self.ranks.of_first(
                [cfg.resume_from_checkpoint, cfg.checkpoint_path]
            )
        return cfg

    def _load_model(self, override_model: Any | None) -> Any | None:
        """The model of the run; None where the cache does, and nothing is evaluated."""
        if override_model is None:
            if self._cache is not None and not evaluates(self.cfg):
                return None
            loading.check_named_model(self.cfg, self._lens)
        model = override_model
        if model is None:
            model = loading.load_model(self.cfg)
        if self._cache is not None:
            self._cache.check(self.cfg, model)
        return model

    def _make_store(
        self, override_dataset: HfDataset | None
    ) -> MultiLayerActivationsStore:
        if self.model is not None:
            self._compile_llm_if_needed()
        if self._cache is not None:
            source = CacheSource.from_config(self._cache, self.cfg, self.ranks)
        else:
            source = ModelSource.from_config(
                self.model, self.cfg, override_dataset, self.ranks
            )
        return MultiLayerActivationsStore.from_source(source, self.cfg, self.ranks)

    def _check_places(self) -> None:
        """Find out before training what cannot be saved or resumed."""
        if self.ranks.is_first:
            self._check_places_to_write()
        if self.cfg.from_pretrained_path is not None:
            check_checkpoint(self.cfg.from_pretrained_path, _identity(self.cfg.sae))
        if self.cfg.resume_from_checkpoint is not None:
            wanted = _identity(self.cfg.sae) | {
                "normalize_activations": self.cfg.normalize_activations
            }
            check_checkpoint(self.cfg.resume_from_checkpoint, wanted)
            trainer_state.check(Path(self.cfg.resume_from_checkpoint))
            check_number_of_ranks(Path(self.cfg.resume_from_checkpoint), self.ranks)

    def _check_places_to_write(self) -> None:
        if self.cfg.output_path is not None:
            check_writable(self.cfg.output_path, "output_path")
        if self.cfg.checkpoint_path is not None:
            check_writable(Path(self.cfg.checkpoint_path) / "new", "checkpoint_path")
        self._check_apart()

    def _check_apart(self) -> None:
        output, checkpoints = self.cfg.output_path, self.cfg.checkpoint_path
        if output is None or checkpoints is None:
            return
        if Path(checkpoints).resolve().is_relative_to(Path(output).resolve()):
            raise ValueError(
                "`checkpoint_path` must lie outside `output_path`, which must be empty "
                f"when the SAE is saved there; got {checkpoints} and {output}."
            )

    def _check_hooks_of_checkpoint(self, hook_names: list[str]) -> None:
        if self.cfg.resume_from_checkpoint is None:
            return
        folder = Path(self.cfg.resume_from_checkpoint)
        found = read_json(folder / SAE_CFG_FILENAME)["metadata"]
        if found.get("hook_names") != hook_names:
            raise ValueError(
                f"The checkpoint at {folder} must be of this run's hooks, "
                f"{hook_names}; it has {found.get('hook_names')}."
            )

    def _make_sae(self) -> TrainingSAE[Any]:
        if self.cfg.from_pretrained_path is not None:
            return TrainingSAE.load_from_disk(
                self.cfg.from_pretrained_path, self.cfg.device
            )
        sae_cfg = self.cfg.get_training_sae_cfg_dict()
        sae_cfg["normalize_activations"] = self.cfg.normalize_activations
        with temporary_seed(self.cfg.seed):
            sae = TrainingSAE.from_dict(sae_cfg)
        if self._lens is not None:
            assert isinstance(sae, LensCarrier)  # checked by the config
            sae.lens = self._lens
        return sae

    def _check_given_sae(self, sae: TrainingSAE[Any]) -> None:
        given: Any = sae
        if not isinstance(given, TrainingSAE):
            raise ValueError(
                "`override_sae` must be an SAE in training, such as a "
                f"MultiLayerTrainingSAE; got {type(given).__name__}. To train on a "
                "saved one, give its folder as `from_pretrained_path`."
            )
        wanted, found = _identity(self.cfg.sae), _identity(sae.cfg)
        if found != wanted:
            raise ValueError(
                f"`override_sae` must be what `sae` in the config says, {wanted}; it "
                f"has {found}."
            )
        self._check_normalization(sae)

    def _check_normalization(self, sae: TrainingSAE[Any]) -> None:
        found = sae.cfg.normalize_activations
        if self.cfg.standardizes_stock_inputs and found != "layer_norm":
            raise ValueError(
                "`normalize_activations` of an SAE that is trained on must be "
                f"'layer_norm' when its inputs are standardised; got {found!r}. Set "
                "`standardize_stock_inputs=False` to train it on raw vectors."
            )

    @override
    def run(self) -> TrainingSAE[Any]:
        """Train, save and return the SAE.

        Raises:
            InterruptedException: After SIGINT or SIGTERM; a checkpoint has been saved.
        """
        self._set_sae_metadata()
        folder = self.cfg.resume_from_checkpoint
        if folder is not None:
            own_folder = folder_of_rank(Path(folder), self.ranks)
            self.activations_store.load_from_checkpoint(own_folder)
        with self._wandb_run(), self._run_batches() as batches:
            trainer = self._make_trainer(batches)
            if folder is not None:
                self._load(trainer, Path(folder))
            batches.start(*self._needs(trainer))
            self._compile_sae_if_needed()
            sae = self.run_trainer_with_interruption_handling(trainer)
            output_path = self.cfg.output_path
            if output_path is not None:
                with self.ranks.together():
                    if self.ranks.is_first:
                        sparsity = trainer.log_feature_sparsity
                        self.save_final_sae(sae, output_path, sparsity)
            return sae

    def _load(self, trainer: MultiLayerTrainer, folder: Path) -> None:
        logger.info("Resuming from %s", folder)
        if self.ranks.is_first:
            self._warn_of_differences(folder)
        trainer.load_trainer_state(folder)
        load_random_states(folder, self.ranks)
        weights = read_tensors(folder / SAE_WEIGHTS_FILENAME)
        self.sae.process_state_dict_for_loading(weights)
        self.sae.load_state_dict(weights)

    def _warn_of_differences(self, checkpoint: Path) -> None:
        found = Record.read(checkpoint, CHECKPOINT_KIND)
        found.warn_of_versions(checkpoint)
        # The lens is the checkpoint's, or there was an error; its path may differ.
        if differences := found.differences(self._record(), ignore=["tuned_lens"]):
            logger.warning(
                "The run is resumed with other settings or inputs than it had in the "
                "checkpoint, so it does not end as it would have:%s",
                as_lines(differences),
            )

    def _record(self) -> Record:
        """What this run's checkpoints are made of."""
        settings = comparable_settings(self.cfg)
        return Record(CHECKPOINT_KIND, settings, self._fingerprints)

    def _make_trainer(self, data_provider: DataProvider) -> MultiLayerTrainer:
        trainer_cfg = self.cfg.to_sae_trainer_config()
        trainer_cfg.hook_names = self.activations_store.hook_names
        return MultiLayerTrainer(
            cfg=trainer_cfg,
            sae=self.sae,
            data_provider=data_provider,
            evaluator=self.evaluator,
            save_checkpoint_fn=self.save_checkpoint,
            initialize_b_dec=self._starts_anew,
            ranks=self.ranks,
            before_checkpoint=self._gather_states,
        )

    @contextmanager
    def _wandb_run(self) -> Generator[None]:
        log = self.cfg.logger
        if not log.log_to_wandb:
            yield
            return
        import wandb

        wandb.init(
            project=log.wandb_project,
            entity=log.wandb_entity,
            config=self.cfg.to_dict(),
            name=log.run_name,
            id=log.wandb_id,
        )
        try:
            yield
        except BaseException:
            wandb.finish(exit_code=1)
            raise
        wandb.finish()

    @contextmanager
    def _run_batches(self) -> Generator[RunBatches]:
        self._batches = RunBatches(
            self.activations_store,
            self.evaluator.draw_prompts,
            prefetch=int(self.cfg.prefetch_llm_batches),
        )
        try:
            yield self._batches
        finally:
            self._batches.close()

    def _needs(self, trainer: MultiLayerTrainer) -> tuple[int, Callable[[int], bool]]:
        """Batches that the run takes from here on, and which an evaluation follows."""
        n_tokens = self.cfg.training_tokens - trainer.n_training_samples
        n_steps = max(0, math.ceil(n_tokens / self.cfg.train_batch_size_tokens))
        n_for_scale = self.cfg.n_batches_for_norm_estimate * trainer.estimates_scale
        first_step = trainer.n_training_steps - n_for_scale
        return (
            n_for_scale + n_steps,
            lambda index: (
                index >= n_for_scale and trainer.is_evaluated_after(first_step + index)
            ),
        )

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> TrainingSAE[Any]:
        """Train; on SIGINT or SIGTERM end after the step under way and save it.

        After an error the state that the last whole step left is saved too; a resumed
        run then asks again for the batch that was not trained on. A second signal ends
        the process at once. Of several ranks all save if all know of the error.
        """
        assert isinstance(trainer, MultiLayerTrainer)
        with _signals_stop(trainer):
            try:
                return trainer.fit()
            except Exception as error:
                if self.ranks.is_alone or isinstance(error, _KNOWN_TO_ALL_RANKS):
                    self._save_progress(trainer)
                raise

    def _save_progress(self, trainer: MultiLayerTrainer) -> None:
        n_tokens = trainer.n_training_samples
        if self.cfg.checkpoint_path is None or not trainer.is_whole or n_tokens == 0:
            return
        if trainer.has_open_batch:
            self._batches.put_back()
        if trainer.save_or_report(str(n_tokens)) and self.ranks.is_first:
            logger.warning(
                "The run has ended early; resume from %s/%d",
                self.cfg.checkpoint_path,
                n_tokens,
            )

    def _gather_states(self) -> None:
        """Let the first rank know where the others stand."""
        if not self.ranks.is_alone:
            state = state_of_rank(self._batches.state.to_tensors())
            self._states = self.ranks.gather_bytes(state)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Write the data's state, the run's config and record into a checkpoint."""
        if checkpoint_path is None:
            return
        state = self._batches.state.to_tensors()
        save_file(state, checkpoint_path / ACTIVATIONS_STORE_STATE_FILENAME)
        write_states(self._states, checkpoint_path)
        cfg = json.dumps(self.cfg.to_dict())
        (checkpoint_path / RUNNER_CFG_FILENAME).write_text(cfg)
        self._record().write(checkpoint_path)

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        """Save the SAE for inference with its run's config; all of it or nothing.

        If something has appeared at `output_path` since the run began, it is saved in a
        new folder beside it, which is logged.
        """
        path = free_path(output_path)
        with complete_or_absent(path) as partial:
            sae.save_inference_model(partial)
            if log_feature_sparsity is not None:
                save_file(
                    {"sparsity": log_feature_sparsity}, partial / SPARSITY_FILENAME
                )
            (partial / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict()))
        # What is on the disk stays there, whatever becomes of the upload.
        if self.cfg.logger.log_to_wandb:
            sparsity = path / SPARSITY_FILENAME
            self.cfg.logger.log(
                self,
                path / SAE_WEIGHTS_FILENAME,
                path / SAE_CFG_FILENAME,
                sparsity_path=sparsity if sparsity.exists() else None,
                wandb_aliases=["final_model"],
            )

    @override
    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        metadata, names = self.sae.cfg.metadata, self.activations_store.hook_names
        # What `Text.from_settings` needs, which SAELens sets in part.
        for name in (*fields_of("text"), "streaming"):
            metadata[name] = getattr(self.cfg, name)
        metadata.hook_names = names
        # A template is no hook, and W&B takes no braces in the name made from it.
        metadata.hook_name = names[0] if len(names) == 1 else None


def _identity(cfg: TrainingSAEConfig) -> dict[str, Any]:
    """What must agree for weights to be of the same SAE."""
    identity = {
        "architecture": cfg.architecture(),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
    }
    k = getattr(cfg, "k", None)
    return identity if k is None else identity | {"k": k}


@contextmanager
def _signals_stop(trainer: MultiLayerTrainer) -> Generator[None]:
    """Make the first SIGINT or SIGTERM end training after a whole step."""
    # Only the main thread may set handlers; elsewhere signals stay as they are.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        trainer.stop_requested = True
        # Not the earlier handlers: SAELens leaves one behind whose exception, raised
        # within a step, would look like a request to save.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if trainer.ranks.is_first:
            logger.warning("Stopping after this step; signal again to stop at once.")

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
