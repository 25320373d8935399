"""The runner: a prepared run with its store, trainer and checkpoints."""

import json
import logging
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAETrainingRunner, TrainingSAE
from sae_lens.config import HfDataset
from sae_lens.constants import (
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import DataProvider
from safetensors.torch import save_file
from typing_extensions import override

from sae_lens_multilayer.config import MultiLayerConfig, fields_of
from sae_lens_multilayer.files import (
    complete_or_absent,
    files_hash,
    read_tensors,
    save_somewhere,
)
from sae_lens_multilayer.ranks import AgreedError
from sae_lens_multilayer.store.source import CacheSource, ModelSource, Source
from sae_lens_multilayer.store.store import MultiLayerActivationsStore
from sae_lens_multilayer.text.dataset import rows_hash
from sae_lens_multilayer.training import checkpoint as checkpoints
from sae_lens_multilayer.training.batches import RunBatches
from sae_lens_multilayer.training.evaluator import (
    MultiLayerEvaluator,
    steps_between_evaluations,
)
from sae_lens_multilayer.training.run import Run, prepare
from sae_lens_multilayer.training.signals import (
    handled_by,
    held_signals,
    restore_defaults,
)
from sae_lens_multilayer.training.trainer import MultiLayerTrainer

logger = logging.getLogger(__name__)

_RAISED_ON_ALL_RANKS = (AgreedError, InterruptedException, FloatingPointError)


class MultiLayerSAETrainingRunner(LanguageModelSAETrainingRunner):
    """Trains one SAE on the activation vectors of many layers.

    `sae_lens.SAETrainingRunner(cfg)` becomes this when `cfg` is a `MultiLayerConfig`.
    """

    cfg: MultiLayerConfig[Any]
    model: Any
    """None in a run from a source, or from a cache without evaluation."""
    activations_store: MultiLayerActivationsStore
    evaluator: MultiLayerEvaluator  # type: ignore[assignment]
    prepared: Run
    """The checked description of this run."""
    _states: Sequence[bytes] = ()
    """States of all ranks for the next checkpoint."""

    def __init__(
        self,
        cfg: MultiLayerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: Any | None = None,
        override_sae: TrainingSAE[Any] | None = None,
        override_source: Source | None = None,
    ) -> None:
        """Check and load what the run needs; see `prepare` for the order.

        Args:
            override_dataset: Used instead of `cfg.dataset_path`; a run from a cache
                reads neither.
            override_model: Used instead of loading `cfg.model_name`.
            override_sae: Trained on instead of a new SAE.
            override_source: Gives the vectors instead of a model or a cache; the run
                has its hooks, and does not evaluate if the source has no prompts.
        """
        run = prepare(cfg, override_model, override_sae, override_source)
        self.prepared, self.ranks = run, run.ranks
        # The attributes are those of the host, with narrower types.
        self.cfg = run.cfg  # pyright: ignore[reportIncompatibleVariableOverride]
        self.model, self.sae = run.model, run.sae
        if self.model is not None:
            self._compile_llm_if_needed()
        store = _make_store(run, override_dataset)
        self.activations_store = store  # pyright: ignore[reportIncompatibleVariableOverride]
        self.evaluator = MultiLayerEvaluator(  # pyright: ignore[reportIncompatibleVariableOverride]
            self.model,
            store,
            n_batches=run.cfg.n_eval_batches,
            batch_size_prompts=run.cfg.eval_batch_size_prompts
            or run.cfg.store_batch_size_prompts,
        )

    @override
    def run(self) -> TrainingSAE[Any]:
        """Train, save and return the SAE.

        Raises:
            InterruptedException: After SIGINT or SIGTERM; a checkpoint has been saved.
            OSError: If the SAE cannot be saved at `output_path`; says where it is.
        """
        self._set_sae_metadata()
        checkpoint = self.prepared.checkpoint
        if checkpoint is not None:
            own = checkpoints.folder_of_rank(checkpoint, self.ranks.index)
            self.activations_store.load_from_checkpoint(own)
        self._batches = batches = RunBatches(
            self.activations_store,
            self.evaluator.draw_prompts,
            prefetch=int(self.cfg.prefetch_llm_batches),
        )
        with self._wandb_run(), closing(batches):
            trainer = self._make_trainer(batches)
            if checkpoint is not None:
                self._resume(trainer, checkpoint)
            batches.start(*self._needs(trainer))
            self._compile_sae_if_needed()
            sae = self.run_trainer_with_interruption_handling(trainer)
            with self.ranks.together():
                if self.ranks.is_first and self.cfg.output_path is not None:
                    self.save_final_sae(
                        sae, self.cfg.output_path, trainer.log_feature_sparsity
                    )
        if trainer.stop_requested:
            raise InterruptedException()
        return sae

    def _resume(self, trainer: MultiLayerTrainer, checkpoint: Path) -> None:
        logger.info("Resuming from %s", checkpoint)
        if self.ranks.is_first:
            checkpoints.warn_of_differences(checkpoint, self.prepared.record)
        trainer.load_trainer_state(checkpoint)
        checkpoints.load_rank_random_states(checkpoint, self.ranks.index)
        weights = read_tensors(checkpoint / SAE_WEIGHTS_FILENAME)
        self.sae.process_state_dict_for_loading(weights)
        self.sae.load_state_dict(weights)

    def _make_trainer(self, data_provider: DataProvider) -> MultiLayerTrainer:
        trainer_cfg = self.cfg.to_sae_trainer_config()
        trainer_cfg.hook_names = self.prepared.hook_names
        return MultiLayerTrainer(
            cfg=trainer_cfg,
            sae=self.sae,
            data_provider=data_provider,
            evaluator=self.evaluator,
            save_checkpoint_fn=self.save_checkpoint,
            initialize_b_dec=self.prepared.starts_anew,
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

    def _needs(self, trainer: MultiLayerTrainer) -> tuple[int, Callable[[int], bool]]:
        """Number of batches of the rest of the run, and after which it evaluates."""
        n_tokens = self.cfg.training_tokens - trainer.n_training_samples
        n_steps = max(0, math.ceil(n_tokens / self.cfg.train_batch_size_tokens))
        n_for_scale = self.cfg.n_batches_for_norm_estimate * trainer.estimates_scale
        every = steps_between_evaluations(self.cfg.logger)
        steps_before = trainer.n_training_steps - n_for_scale
        return (
            n_for_scale + n_steps,
            lambda index: (
                every is not None
                and index >= n_for_scale
                and (steps_before + index + 1) % every == 0
            ),
        )

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> TrainingSAE[Any]:
        """Train; on SIGINT or SIGTERM end after the current step and save it.

        After an error on all ranks, the last whole step is saved too; a resumed run
        takes the failed batch again. A second signal ends the process at once, or after
        a save under way.
        """
        assert isinstance(trainer, MultiLayerTrainer)

        def stop(_number: int, _frame: Any) -> None:
            trainer.stop_requested = True
            restore_defaults()
            if trainer.ranks.is_first:
                logger.warning("Stopping after this step; signal again to stop now.")

        with handled_by(stop):
            try:
                return trainer.fit()
            except Exception as error:
                if self.ranks.is_alone or isinstance(error, _RAISED_ON_ALL_RANKS):
                    self._save_progress(trainer)
                raise

    def _save_progress(self, trainer: MultiLayerTrainer) -> None:
        n_tokens = trainer.n_training_samples
        if self.cfg.checkpoint_path is None or not trainer.is_whole or n_tokens == 0:
            return
        if trainer.has_open_batch:
            self._batches.put_back()
        if trainer.save_or_report(str(n_tokens)) and self.ranks.is_first:
            path = Path(self.cfg.checkpoint_path, str(n_tokens))
            logger.warning("The run has ended early; resume from %s", path)

    def _gather_states(self) -> None:
        """Gather the states of all ranks on the first."""
        if not self.ranks.is_alone:
            state = checkpoints.state_of_rank(self._batches.state.to_tensors())
            self._states = self.ranks.gather_bytes(state)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Write the data's state, the run's config and record into a checkpoint."""
        if checkpoint_path is None:
            return
        state = self._batches.state.to_tensors()
        save_file(state, checkpoint_path / ACTIVATIONS_STORE_STATE_FILENAME)
        checkpoints.write_rank_states(self._states, checkpoint_path)
        cfg = json.dumps(self.cfg.to_dict())
        (checkpoint_path / RUNNER_CFG_FILENAME).write_text(cfg)
        self.prepared.record.write(checkpoint_path)

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        """Save the SAE for inference with its run's config; all of it or nothing.

        If something has appeared at `output_path` since the run began, it is saved in a
        new folder beside it, which is logged; if it cannot be written, elsewhere, and
        an OSError has that path.
        """
        path = save_somewhere(
            Path(output_path),
            lambda path: self._write_sae(sae, path, log_feature_sparsity),
            self.cfg.checkpoint_path,
        )
        logger.info("Written: %s, the trained SAE.", path)
        checkpoints.upload(self, path, ["final_model"])

    def _write_sae(
        self, sae: TrainingSAE[Any], path: Path, sparsity: torch.Tensor | None
    ) -> None:
        with held_signals(), complete_or_absent(path) as partial:
            sae.save_inference_model(partial)
            if sparsity is not None:
                save_file({"sparsity": sparsity}, partial / SPARSITY_FILENAME)
            (partial / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict()))

    @override
    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        metadata, names = self.sae.cfg.metadata, self.prepared.hook_names
        # What `Text.from_settings` needs, which SAELens sets in part.
        for name in (*fields_of("text"), "streaming"):
            metadata[name] = getattr(self.cfg, name)
        metadata.hook_names = names
        # A template is no hook, and W&B takes no braces in the name made from it.
        metadata.hook_name = names[0] if len(names) == 1 else None


def _make_store(
    run: Run, override_dataset: HfDataset | None
) -> MultiLayerActivationsStore:
    cfg, ranks = run.cfg, run.ranks
    if run.source is not None:
        source = run.source
    elif run.cache is not None:
        source = CacheSource.from_config(run.cache, run.hook_names, cfg, ranks)
    else:
        source = ModelSource.from_config(
            run.model, run.hook_names, cfg, override_dataset, ranks
        )
        files = None if override_dataset else files_hash(cfg.dataset_path)
        rows: Any = source.reader.dataset
        found = files or rows_hash(rows)
        run.record.fingerprints["dataset_hash"] = found
    return MultiLayerActivationsStore.from_source(source, cfg, ranks)
