"""Loads published checkpoints, from the hub or from a folder, as SAELens' loaders do.

`SAE.from_pretrained` uses the loader for the hub, which `_registration` registers under
`LOADER_NAME`. Load a folder with `MultiLayerSAE.load_from_disk(folder)`, or that of any
SAELens class with `converter=mlsae_disk_loader`.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from torch import Tensor

from sae_lens_multilayer.files import read_json
from sae_lens_multilayer.published import format as mlsae

LOADER_NAME = "mlsae"
"""The name of these loaders in SAELens' registries."""

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def mlsae_huggingface_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    *,
    model_name: str | None = None,
    tuned_lens: str | Path | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """Load a published checkpoint, or one hook of it, from the hub or its cache.

    Any repository of this format loads with `SAE.from_pretrained(repository, hook_name,
    converter=mlsae_huggingface_loader)`; a `hook_name` of "" means the whole SAE. If
    neither its name nor its config names the model, use
    `functools.partial(mlsae_huggingface_loader, model_name=...)`.

    Args:
        repo_id: The repository, or its owner if `folder_name` begins with its name.
        folder_name: The name of a hook, or nothing for the whole SAE.
        cfg_overrides: Entries that replace those of the config.
        model_name: As in `mlsae_disk_loader`.
        tuned_lens: As in `mlsae_disk_loader`.
    """
    repository, hook_name = _split(repo_id, folder_name)
    config = hf_hub_download(repository, _CONFIG, force_download=force_download)
    weights = hf_hub_download(repository, _WEIGHTS, force_download=force_download)
    cfg, tensors = mlsae.load(
        Path(config),
        Path(weights),
        repository,
        device,
        cfg_overrides,
        hook_name=hook_name,
        model_name=model_name,
        tuned_lens=tuned_lens,
    )
    return cfg, tensors, None


def get_mlsae_config_from_hf(
    repo_id: str,
    folder_name: str,
    device: str | None = None,
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The config of `mlsae_huggingface_loader`, without downloading the tensors."""
    repository, hook_name = _split(repo_id, folder_name)
    config = hf_hub_download(repository, _CONFIG, force_download=force_download)
    return mlsae.load_config(Path(config), repository, device, cfg_overrides, hook_name)


def mlsae_disk_loader(
    path: str | Path,
    device: str = "cpu",
    cfg_overrides: dict[str, Any] | None = None,
    *,
    model_name: str | None = None,
    tuned_lens: str | Path | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load the published files from a folder: a `converter` of `SAE.load_from_disk`.

    The number of layers comes from the model, so name the folder like the repository,
    or use `functools.partial(mlsae_disk_loader, model_name=...)`. Otherwise the SAE has
    no hooks: it encodes and decodes, but has no views.

    Args:
        path: A folder with `config.json` and `model.safetensors`.
        cfg_overrides: Entries that replace those of the config.
        model_name: The language model's name for TransformerLens.
        tuned_lens: For a `-lens` checkpoint: a folder that tuned-lens saved, or a name
            in its hub space; None: the model's, if the folder's name or the config
            states that it has one.
    """
    path = Path(path)
    missing = [n for n in (_CONFIG, _WEIGHTS) if not (path / n).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} must be a folder with the published {_CONFIG} and {_WEIGHTS}; "
            f"{missing} are missing. A folder that SAELens saved needs no converter."
        )
    return mlsae.load(
        path / _CONFIG,
        path / _WEIGHTS,
        str(path.resolve()),
        device,
        cfg_overrides,
        model_name=model_name,
        tuned_lens=tuned_lens,
    )


def has_published_files(path: Path) -> bool:
    """Whether a folder has the config of a published checkpoint."""
    return (path / _CONFIG).is_file()


def own_or_mlsae_disk_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SAELens' loader for folders that it saved, else `mlsae_disk_loader`."""
    file = Path(path) / SAE_CFG_FILENAME
    if not file.is_file():
        return mlsae_disk_loader(path, device, cfg_overrides)
    # SAELens' loader needs a dtype, which old configs lack.
    dtype = read_json(file).get("dtype", "float32")
    return sae_lens_disk_loader(path, device, {"dtype": dtype, **(cfg_overrides or {})})


def _split(repo_id: str, folder_name: str) -> tuple[str, str | None]:
    """The repository, and the hook or None."""
    parts = [part for part in f"{repo_id}/{folder_name}".split("/") if part]
    return "/".join(parts[:2]), "/".join(parts[2:]) or None
