"""The folder of a run's checkpoints: validate, find the newest, delete old ones."""

import copy
import logging
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_lens_multilayer.config import LATEST, MultiLayerConfig
from sae_lens_multilayer.files import read_json, remove_folder, remove_leftovers
from sae_lens_multilayer.record import Record
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

CHECKPOINT_KIND = "checkpoint"


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
    wanted = Record(CHECKPOINT_KIND, comparable_settings(cfg))
    newest_first = sorted(states, key=lambda s: s.stat().st_mtime_ns, reverse=True)
    for state in newest_first:
        try:
            found = Record.read(state.parent, CHECKPOINT_KIND)
        except (OSError, ValueError) as error:
            logger.warning("The checkpoint %s is skipped: %s", state.parent, error)
            continue
        if not found.differences(wanted):
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


def comparable_settings(cfg: MultiLayerConfig[Any]) -> dict[str, Any]:
    """Settings of a run that change the weights it ends with.

    Those of the SAE have names such as "sae.d_sae".
    """
    settings = {n: v for n, v in cfg.to_dict().items() if n not in _WITHOUT_EFFECT}
    sae = settings.pop("sae")
    # The metadata names where the weights come from, and changes during the run.
    return settings | {f"sae.{n}": v for n, v in sae.items() if n != "metadata"}


def check_checkpoint(path: str | Path, wanted: dict[str, Any]) -> None:
    """Check that a folder holds a checkpoint of a certain SAE.

    Args:
        wanted: Entries that its `cfg.json` must have: architecture, sizes and so on.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it is the checkpoint of another SAE, or damaged.
    """
    path = Path(path)
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} must be a checkpoint folder with {SAE_CFG_FILENAME} and "
                f"{SAE_WEIGHTS_FILENAME}; {name} is not there."
            )
    cfg = read_json(path / SAE_CFG_FILENAME)
    found = {key: cfg.get(key) for key in wanted}
    if found != wanted:
        raise ValueError(
            f"The checkpoint at {path} must be of this run's SAE, {wanted}; it has "
            f"{found}."
        )


def keep_newest(run_folder: Path, n: int) -> None:
    """Delete a run's checkpoints except the `n` with the most tokens.

    A final one, which has another name, is neither counted nor deleted.
    """
    found = [path for path in run_folder.iterdir() if path.name.isdigit()]
    for path in sorted(found, key=lambda path: int(path.name))[:-n]:
        remove_folder(path)
