"""A local folder in place of the Hugging Face hub, with the layout of the hub's cache.

`upload_saes_to_huggingface` writes to the folder, and huggingface_hub reads from it as
from its cache. Outside of `local_hub` the same calls reach the real hub.
"""

import fnmatch
import hashlib
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub import constants
from sae_lens.training import upload_saes_to_huggingface as host

_COMMIT = "0" * 40


@contextmanager
def local_hub(cache: Path) -> Generator[Path, None, None]:
    """Redirect uploads and downloads to a folder, without network access."""
    api = _LocalApi(cache)
    with (
        mock.patch.object(constants, "HF_HUB_CACHE", str(cache)),
        mock.patch.object(constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(host, "HfApi", return_value=api),
        mock.patch.object(host, "_repo_file_exists", api.has),
    ):
        yield cache


def put(
    cache: Path, repository: str, files: dict[str, bytes], kind: str = "models"
) -> Path:
    """Write files to a cache like a download of a repository; returns the snapshot."""
    folder = cache / f"{kind}--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / _COMMIT
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        link = snapshot / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(_COMMIT)
    return snapshot


class _LocalApi:
    """The methods of `HfApi` that SAELens uses for uploads."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def repo_info(self, repo_id: str) -> None:
        """Every repository exists."""

    def has(self, repo_id: str, filename: str, revision: str) -> bool:
        del revision
        folder = self.cache / f"models--{repo_id.replace('/', '--')}"
        return (folder / "snapshots" / _COMMIT / filename).exists()

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        path_in_repo: str,
        allow_patterns: Sequence[str],
        **_: Any,
    ) -> None:
        files = {
            f"{path_in_repo}/{path.name}": path.read_bytes()
            for path in Path(folder_path).iterdir()
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns)
        }
        put(self.cache, repo_id, files)

    def upload_file(
        self, *, repo_id: str, path_or_fileobj: Any, path_in_repo: str, **_: Any
    ) -> None:
        put(self.cache, repo_id, {path_in_repo: path_or_fileobj.read()})
