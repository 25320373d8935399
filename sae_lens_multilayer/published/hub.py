"""Files of the Hugging Face hub, with errors that say what is there instead."""

from pathlib import Path

from huggingface_hub import constants, hf_hub_download, scan_cache_dir
from huggingface_hub.errors import (
    CacheNotFound,
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from sae_lens_multilayer.published.releases import nearest, owner, published_names


def download(repository: str, filename: str, force_download: bool = False) -> Path:
    """A file of a repository, from the cache or the hub.

    Raises:
        FileNotFoundError: If it is not cached and the hub cannot be reached; lists what
            is cached.
        ValueError: If there is no such repository, or it does not have the file.
    """
    try:
        path = hf_hub_download(repository, filename, force_download=force_download)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(_not_cached(repository, filename)) from error
    except RepositoryNotFoundError as error:
        known = [f"{owner()}/{name.repository}" for name in published_names()]
        raise ValueError(
            f"There is no repository {repository!r} that you can read on the Hugging "
            f"Face hub. The nearest of the published MLSAEs are "
            f"{nearest(repository, known)}."
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"{repository} is not a published MLSAE: it has no {filename!r}."
        ) from error
    return Path(path)


def _not_cached(repository: str, filename: str) -> str:
    cached = _cached_files()
    own = cached.get(repository, [])
    published = sorted(name for name in cached if name.startswith(f"{owner()}/"))
    return (
        f"{filename!r} of {repository} is not cached, and the Hugging Face hub cannot "
        f"be reached (no network, or HF_HUB_OFFLINE is set). Cached of this "
        f"repository: {own or 'nothing'}; cached of {owner()}: "
        f"{published or 'nothing'}."
    )


def _cached_files() -> dict[str, list[str]]:
    """The names of the files in the hub's cache, by repository."""
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return {}
    return {
        repository.repo_id: sorted(
            {file.file_name for r in repository.revisions for file in r.files}
        )
        for repository in repositories
        if repository.repo_type == "model"
    }
