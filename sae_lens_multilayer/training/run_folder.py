"""The folder with a run's checkpoints: which is the newest, which may go."""

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_multilayer.config import LATEST, MultiLayerConfig
from sae_lens_multilayer.files import PARTIAL_PREFIX, read_json
from sae_lens_multilayer.training.trainer_state import VALUES_FILENAME

logger = logging.getLogger(__name__)

_WITHOUT_EFFECT = (
    "output_path",
    "checkpoint_path",
    "resume_from_checkpoint",
    "cached_activations_path",
    "n_checkpoints",
    "keep_last_n_checkpoints",
    "save_final_checkpoint",
    "prefetch_llm_batches",
    "logger",
    "verbose",
    "sae_lens_version",
    "sae_lens_training_version",
)
"""Settings that do not change the weights that a run ends with."""


def latest_checkpoint(cfg: MultiLayerConfig[Any]) -> Path | None:
    """The newest checkpoint of a run with these settings; None if there is none.

    It looks in the `checkpoint_path` that the config was made with, and in all runs'
    folders beneath it, or in that of the run alone if it has a `wandb_id`.
    """
    assert cfg.checkpoint_path is not None  # checked by the config
    own = Path(cfg.checkpoint_path)
    runs = [own] if cfg.logger.wandb_id else [own.parent, *own.parent.glob("*")]
    # A name with a dot at its beginning is of a folder that is not complete.
    states = [state for run in runs for state in run.glob(f"[!.]*/{VALUES_FILENAME}")]
    newest_first = sorted(states, key=lambda s: s.stat().st_mtime_ns, reverse=True)
    for state in newest_first:
        try:
            differing = settings_that_differ(cfg, state.parent)
        except (OSError, ValueError) as error:
            logger.warning("The checkpoint %s is left out: %s", state.parent, error)
            continue
        if not differing:
            return state.parent
    logger.info(
        "There is no checkpoint of this run under %s (%d of others); starting anew.",
        own.parent,
        len(states),
    )
    return None


def resolve_latest(cfg: MultiLayerConfig[Any]) -> MultiLayerConfig[Any]:
    """Replace "latest" by the newest checkpoint, and go on in its run's folder."""
    if cfg.resume_from_checkpoint != LATEST:
        return cfg
    found = latest_checkpoint(cfg)
    cfg = copy.copy(cfg)
    cfg.resume_from_checkpoint = None
    if found is not None:
        cfg.resume_from_checkpoint = str(found)
        cfg.checkpoint_path = str(found.parent)
        remove_leftovers(found.parent)
    return cfg


def settings_that_differ(cfg: MultiLayerConfig[Any], checkpoint: Path) -> list[str]:
    """Names of the settings, among those with an effect, that a checkpoint's run had
    otherwise.

    Raises:
        ValueError: If the checkpoint's config is torn.
    """
    wanted = comparable_settings(cfg)
    found = _settings(read_json(checkpoint / RUNNER_CFG_FILENAME))
    names = sorted(wanted.keys() | found.keys())
    return [name for name in names if wanted.get(name) != found.get(name)]


def comparable_settings(cfg: MultiLayerConfig[Any]) -> dict[str, Any]:
    """The settings of a run that have an effect, as they come back from a file."""
    return _settings(json.loads(json.dumps(cfg.to_dict())))


def _settings(cfg: dict[str, Any]) -> dict[str, Any]:
    kept = {name: v for name, v in cfg.items() if name not in _WITHOUT_EFFECT}
    # Metadata says where weights come from and is filled in while the run goes on.
    return kept | {"sae": {k: v for k, v in kept["sae"].items() if k != "metadata"}}


def remove_leftovers(run_folder: Path) -> None:
    """Remove what a killed process had begun to write or to delete."""
    for leftover in run_folder.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def keep_newest(run_folder: Path, n: int) -> None:
    """Delete a run's checkpoints but the `n` of most tokens.

    A final one, which is named otherwise, neither counts nor goes. At no moment does a
    folder that is half deleted look like a checkpoint.
    """
    found = [path for path in run_folder.iterdir() if path.name.isdigit()]
    for path in sorted(found, key=lambda path: int(path.name))[:-n]:
        doomed = run_folder / f"{PARTIAL_PREFIX}{uuid4().hex[:8]}"
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
