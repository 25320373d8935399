"""Checkpoints of a training run: their content, validation, finding and deleting.

Tensors are stored by safetensors, everything else as JSON; nothing is pickled.
"""

import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAEConfig
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save, save_file
from torch import Tensor
from torch.nn.utils import get_total_norm

from sae_lens_multilayer.files import (
    complete_or_absent,
    read_json,
    read_tensors,
    remove_folder,
)
from sae_lens_multilayer.optimizer_state import (
    load_optimizer_tensors,
    optimizer_tensors,
)
from sae_lens_multilayer.record import Record, as_lines
from sae_lens_multilayer.training.signals import held_signals

logger = logging.getLogger(__name__)

CHECKPOINT_KIND = "checkpoint"
TENSORS_FILENAME = "trainer_state.safetensors"
VALUES_FILENAME = "trainer_state.json"

_RANK_FOLDER = "rank_"
"""Prefix of the folders with the states of all ranks but the first."""
_COUNTERS = ("tokens_since_fired", "act_freq_scores")
_NUMBERS = ("n_training_samples", "n_training_steps", "n_frac_active_samples")
_FIXED = ("seed", "from_pretrained_path", "sae.decoder_init_norm")
"""Settings that have had their effect when a run is resumed."""


def identity_of(cfg: TrainingSAEConfig, normalize_activations: str) -> dict[str, Any]:
    """Settings that must agree for weights to be of the same SAE.

    Args:
        normalize_activations: The value of the SAE that is trained and saved.
    """
    sizes = {name: getattr(cfg, name, None) for name in ("d_in", "d_sae", "k")}
    first = {
        "architecture": cfg.architecture(),
        "normalize_activations": normalize_activations,
    }
    return first | {name: value for name, value in sizes.items() if value is not None}


def check_checkpoint(
    path: str | Path, wanted: dict[str, Any], extra_files: Sequence[str] = ()
) -> None:
    """Check a folder's files, and the `wanted` settings and hooks of its SAE."""
    path = Path(path)
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, *extra_files):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} must be a checkpoint folder; {name} is not there."
            )
    cfg = read_json(path / SAE_CFG_FILENAME)
    cfg |= {"hook_names": cfg.get("metadata", {}).get("hook_names")}
    found = {key: cfg.get(key) for key in wanted}
    if found != wanted:
        raise ValueError(
            f"The checkpoint at {path} must be of this run's SAE, {wanted}; it has "
            f"{found}."
        )


def check_resumable(
    path: Path, wanted: dict[str, Any], settings: dict[str, Any], n_ranks: int
) -> None:
    """Check that a run with these settings can be resumed from a checkpoint."""
    check_checkpoint(path, wanted, (TENSORS_FILENAME, VALUES_FILENAME))
    found = 1 + len(list(path.glob(f"{_RANK_FOLDER}*")))
    if found != n_ranks:
        raise ValueError(
            f"The checkpoint at {path} is of a run of {found} processes; this run has "
            f"{n_ranks}. Resume with torchrun --nproc_per_node {found}, or start a new "
            "run from its weights with `from_pretrained_path`."
        )
    fixed = {name: settings[name] for name in _FIXED if name in settings}
    advice = (
        "They have had their effect: use those, or start a new run from the weights "
        "with `from_pretrained_path`."
    )
    Record.read_same(path, Record(CHECKPOINT_KIND, fixed), advice)


def warn_of_differences(path: Path, now: Record) -> None:
    """Log the settings and inputs that differ from a checkpoint's, and take effect."""
    found = Record.read(path, CHECKPOINT_KIND)
    found.warn_of_versions(path)
    # The lens has been compared with the checkpoint's; its path may differ.
    if differences := found.differences(now, ignore=["lens"]):
        logger.warning(
            "The run is resumed with other settings or inputs than the checkpoint's. "
            "They take effect from here on:%s",
            as_lines(differences),
        )


def latest_checkpoint(folders: Iterable[Path], settings: dict[str, Any]) -> Path | None:
    """The newest checkpoint with these settings in some folders of runs, or None."""
    # A name that begins with a dot is of an incomplete folder.
    states = [s for folder in folders for s in folder.glob(f"[!.]*/{VALUES_FILENAME}")]
    wanted = Record(CHECKPOINT_KIND, settings)
    for state in sorted(states, key=lambda s: s.stat().st_mtime_ns, reverse=True):
        try:
            found = Record.read(state.parent, CHECKPOINT_KIND)
        except (OSError, ValueError) as error:
            logger.warning("The checkpoint %s is skipped: %s", state.parent, error)
            continue
        if not found.differences(wanted):
            return state.parent
    if states:
        logger.info(
            "None of %d checkpoints has the settings of this run; starting anew.",
            len(states),
        )
    return None


def keep_newest(run_folder: Path, n: int) -> None:
    """Delete a run's checkpoints except the `n` with the most tokens.

    A final one, which has another name, is neither counted nor deleted.
    """
    found = [path for path in run_folder.iterdir() if path.name.isdigit()]
    for path in sorted(found, key=lambda path: int(path.name))[:-n]:
        remove_folder(path)


def not_finite(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    given = {
        name: t
        for name, t in tensors.items()
        if t is not None and t.is_floating_point() and t.numel()
    }
    # The largest entry of all is found in one pass, without a copy.
    if not given or get_total_norm(given.values(), float("inf")).isfinite():
        return []
    return [name for name, tensor in given.items() if not tensor.isfinite().all()]


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise FloatingPointError if a tensor that is to be saved is not finite."""
    if names := not_finite(tensors):
        raise FloatingPointError(
            f"Weights and optimiser must be finite to be saved; {names} are not. Lower "
            "`lr`, or resume from an earlier checkpoint with a lower one."
        )


def write_checkpoint(
    trainer: SAETrainer[Any, Any],
    path: Path,
    n_kept: int | None,
    wandb_aliases: list[str] | None,
) -> None:
    """Write a checkpoint that is complete or not there; keep the `n_kept` newest."""
    if path.exists():
        logger.info("The checkpoint %s exists already.", path)
        return
    check_finite(trainer.sae.state_dict())
    with held_signals(), complete_or_absent(path) as partial:
        trainer.sae.save_model(partial)
        sparsity = {"sparsity": trainer.log_feature_sparsity}
        save_file(sparsity, partial / SPARSITY_FILENAME)
        trainer.save_trainer_state(partial)
        if trainer.save_checkpoint_fn is not None:
            trainer.save_checkpoint_fn(checkpoint_path=partial)
    if n_kept is not None:
        keep_newest(path.parent, n_kept)
    upload(trainer, path, wandb_aliases)


def upload(owner: Any, folder: Path, wandb_aliases: list[str] | None) -> None:
    """Upload a saved SAE, if W&B is used; it stays on the disk if that fails."""
    if owner.cfg.logger.log_to_wandb:
        sparsity = folder / SPARSITY_FILENAME
        owner.cfg.logger.log(
            owner,
            folder / SAE_WEIGHTS_FILENAME,
            folder / SAE_CFG_FILENAME,
            sparsity_path=sparsity if sparsity.exists() else None,
            wandb_aliases=wandb_aliases,
        )


def write_trainer_state(trainer: SAETrainer[Any, Any], folder: Path) -> None:
    """Write optimiser, counters and random states; schedules follow from them."""
    tensors = {name: getattr(trainer, name) for name in _COUNTERS}
    tensors |= optimizer_tensors(trainer.optimizer)
    check_finite(tensors)
    tensors |= random_states()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / TENSORS_FILENAME,
    )
    values = {name: int(getattr(trainer, name)) for name in _NUMBERS}
    (folder / VALUES_FILENAME).write_text(json.dumps(values))
    trainer.activation_scaler.save(str(folder / ACTIVATION_SCALER_CFG_FILENAME))


def load_trainer_state(trainer: SAETrainer[Any, Any], folder: Path) -> None:
    """Load what `write_trainer_state` wrote into a new trainer.

    Learning rate, betas, epsilon and schedules remain those of its config.
    """
    tensors = read_tensors(folder / TENSORS_FILENAME, trainer.cfg.device)
    values = read_json(folder / VALUES_FILENAME)
    for name in _COUNTERS:
        setattr(trainer, name, tensors[name])
    for name in _NUMBERS:
        setattr(trainer, name, values[name])
    set_random_states(tensors)
    load_optimizer_tensors(trainer.optimizer, tensors)
    with warnings.catch_warnings():
        # torch warns of schedules that are advanced before the optimiser's first step.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(trainer.n_training_steps):
            trainer.lr_scheduler.step()
    for scheduler in trainer.coefficient_schedulers.values():
        scheduler.load_state_dict({"current_step": trainer.n_training_steps})
    trainer.activation_scaler.load(folder / ACTIVATION_SCALER_CFG_FILENAME)


def random_states() -> dict[str, Tensor]:
    """States of torch's generators, which an architecture may use."""
    states = {"random.cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        states[f"random.cuda.{index}"] = torch.cuda.get_rng_state(index)
    return states


def set_random_states(tensors: Mapping[str, Tensor]) -> None:
    """Set torch's generators to the result of `random_states`."""
    torch.set_rng_state(tensors["random.cpu"].cpu())
    for index in range(torch.cuda.device_count()):
        # A run may be resumed with more devices.
        if f"random.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{index}"].cpu(), index)


def state_of_rank(store_state: dict[str, Tensor]) -> bytes:
    """The part of a checkpoint that differs between ranks."""
    return save(store_state | random_states())


def write_rank_states(states: Sequence[bytes], checkpoint: Path) -> None:
    """Write the states of the ranks after the first into a checkpoint."""
    for index, state in enumerate(states[1:], start=1):
        folder = folder_of_rank(checkpoint, index)
        folder.mkdir()
        (folder / ACTIVATIONS_STORE_STATE_FILENAME).write_bytes(state)


def folder_of_rank(checkpoint: Path, index: int) -> Path:
    """The folder with the state of a rank's store in a checkpoint."""
    return checkpoint if index == 0 else checkpoint / f"{_RANK_FOLDER}{index}"


def load_rank_random_states(checkpoint: Path, index: int) -> None:
    """Set torch's generators to those of this rank, after `load_trainer_state`."""
    if index > 0:
        folder = folder_of_rank(checkpoint, index)
        set_random_states(read_tensors(folder / ACTIVATIONS_STORE_STATE_FILENAME))
