"""A trainer's state on disk: tensors by safetensors, everything else as JSON."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_multilayer.files import read_json, read_tensors

if TYPE_CHECKING:
    from sae_lens_multilayer.training.trainer import MultiLayerTrainer

TENSORS_FILENAME = "trainer_state.safetensors"
VALUES_FILENAME = "trainer_state.json"

_COUNTERS = ("tokens_since_fired", "act_freq_scores")
_NUMBERS = ("n_training_samples", "n_training_steps", "n_frac_active_samples")


def save(trainer: "MultiLayerTrainer", folder: Path) -> None:
    """Write the state of a trainer into a checkpoint folder."""
    optimizer = trainer.optimizer.state_dict()
    tensors = {name: getattr(trainer, name) for name in _COUNTERS}
    tensors |= random_states()
    for index, state in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / TENSORS_FILENAME,
    )
    values = {name: getattr(trainer, name) for name in _NUMBERS} | {
        "param_groups": optimizer["param_groups"],
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficient_schedulers": {
            name: scheduler.state_dict()
            for name, scheduler in trainer.coefficient_schedulers.items()
        },
    }
    (folder / VALUES_FILENAME).write_text(json.dumps(values, default=_plain))
    trainer.activation_scaler.save(str(folder / ACTIVATION_SCALER_CFG_FILENAME))


def check(folder: Path) -> None:
    """Raise FileNotFoundError if a folder has no state of a trainer."""
    for name in (TENSORS_FILENAME, VALUES_FILENAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} must be a checkpoint folder of a training run of this "
                f"package; {name} is not there."
            )


def load(trainer: "MultiLayerTrainer", folder: Path) -> None:
    """Bring a trainer into the state that `save` wrote.

    Raises:
        FileNotFoundError: If the folder has no such state.
        ValueError: If a file is torn.
    """
    check(folder)
    tensors = read_tensors(folder / TENSORS_FILENAME, trainer.cfg.device)
    values = read_json(folder / VALUES_FILENAME)
    for name in _COUNTERS:
        setattr(trainer, name, tensors[name])
    for name in _NUMBERS:
        setattr(trainer, name, values[name])
    set_random_states(tensors)
    trainer.optimizer.load_state_dict(
        {
            "state": _optimizer_state(trainer, tensors),
            "param_groups": values["param_groups"],
        }
    )
    trainer.lr_scheduler.load_state_dict(values["lr_scheduler"])
    for name, state in values["coefficient_schedulers"].items():
        trainer.coefficient_schedulers[name].load_state_dict(state)
    trainer.activation_scaler.load(folder / ACTIVATION_SCALER_CFG_FILENAME)


def random_states() -> dict[str, Tensor]:
    """The states of torch's generators, which an architecture may use.

    What this package draws is the store's own.
    """
    states = {"random.cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        states[f"random.cuda.{index}"] = torch.cuda.get_rng_state(index)
    return states


def set_random_states(tensors: dict[str, Tensor]) -> None:
    """Set torch's generators to what `random_states` gave."""
    torch.set_rng_state(tensors["random.cpu"].cpu())
    for index in range(torch.cuda.device_count()):
        # A run may go on where there are more devices.
        if f"random.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{index}"].cpu(), index)


def _optimizer_state(
    trainer: "MultiLayerTrainer", tensors: dict[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    params = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            # The fused update needs moments laid out in memory as their parameter is.
            like = params[int(index)]
            if tensor.shape == like.shape:
                tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor
    return state


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    raise TypeError(f"{type(value).__name__} in the trainer's state is not JSON.")
