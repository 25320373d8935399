"""A training run of several ranks: each one's config, and its part of a checkpoint."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from safetensors.torch import save
from torch import Tensor

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.files import read_tensors
from sae_lens_multilayer.ranks import Ranks, own_device, ranks_of_environment
from sae_lens_multilayer.training import trainer_state
from sae_lens_multilayer.training.run_folder import comparable_settings

_FOLDER = "rank_"
"""Begins the names of the folders in a checkpoint of all ranks but the first."""


def join_ranks(
    cfg: MultiLayerConfig[Any],
) -> tuple[Ranks, MultiLayerConfig[Any]]:
    """The ranks of a run, and its config as this one has it.

    A rank has the GPU of its number; only the first logs. A run of one process has the
    config as it is.

    Raises:
        ValueError: If the run cannot be divided among the ranks.
        RankError: If the ranks were given different settings.
    """
    ranks = ranks_of_environment(str(cfg.device))
    if ranks.is_alone:
        return ranks, cfg
    _check_divides(cfg, ranks)
    ranks.check_same("Settings", comparable_settings(cfg))
    cfg = copy.copy(cfg)
    for name in ("device", "llm_device", "act_store_device"):
        setattr(cfg, name, own_device(str(getattr(cfg, name))))
    if not ranks.is_first:
        cfg.logger = replace(cfg.logger, log_to_wandb=False)
    return ranks, cfg


def _check_divides(cfg: MultiLayerConfig[Any], ranks: Ranks) -> None:
    if cfg.train_batch_size_tokens % ranks.count:
        raise ValueError(
            "`train_batch_size_tokens` is the batch of all processes together and must "
            f"be a multiple of their number; got {cfg.train_batch_size_tokens} and "
            f"{ranks.count}."
        )
    if cfg.sae.normalize_activations == "covariance_whitening":
        raise ValueError(
            "`normalize_activations='covariance_whitening'` estimates a matrix that "
            f"SAELens cannot put together from those of {ranks.count} processes. Train "
            "in one, or use another normalisation."
        )


def state_of_rank(store_state: dict[str, Tensor]) -> bytes:
    """All of a checkpoint that differs between ranks."""
    return save(store_state | trainer_state.random_states())


def write_states(states: Sequence[bytes], checkpoint: Path) -> None:
    """Write the states of the ranks after the first into a checkpoint."""
    for index, state in enumerate(states[1:], start=1):
        folder = checkpoint / f"{_FOLDER}{index}"
        folder.mkdir()
        (folder / ACTIVATIONS_STORE_STATE_FILENAME).write_bytes(state)


def folder_of_rank(checkpoint: Path, ranks: Ranks) -> Path:
    """Where the place of this rank's store is in a checkpoint."""
    return checkpoint if ranks.is_first else checkpoint / f"{_FOLDER}{ranks.index}"


def load_random_states(checkpoint: Path, ranks: Ranks) -> None:
    """Set torch's generators as this rank had them; the trainer sets the first's."""
    if not ranks.is_first:
        file = folder_of_rank(checkpoint, ranks) / ACTIVATIONS_STORE_STATE_FILENAME
        trainer_state.set_random_states(read_tensors(file))


def check_number_of_ranks(checkpoint: Path, ranks: Ranks) -> None:
    """Raise ValueError if a checkpoint is of a run of more or fewer ranks."""
    found = 1 + len(list(checkpoint.glob(f"{_FOLDER}*")))
    if found != ranks.count:
        raise ValueError(
            f"The checkpoint at {checkpoint} is of a run of {found} processes, each of "
            f"which has its place in the data; this one has {ranks.count}. Go on with "
            f"torchrun --nproc_per_node {found}, or begin a new run from its weights "
            "with `from_pretrained_path`."
        )
