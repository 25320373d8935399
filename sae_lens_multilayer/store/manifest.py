"""What a cache says of itself, and whether that is what a run needs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sae_lens.util import dtype_to_str, str_to_dtype

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.files import read_json
from sae_lens_multilayer.fingerprints import tokenizer_hash
from sae_lens_multilayer.models.kinds import as_model

MANIFEST_FILENAME = "manifest.json"
SHARD_FOLDERS = "shard-*"
FORMAT = 1

_SETTINGS = (
    "model_name",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "model_kwargs",
    "autocast_lm",
    "hook_head_index",
    "dataset_path",
    "use_chat_formatting",
    "context_size",
    "prepend_bos",
    "sequence_separator_token",
    "disable_concat_sequences",
    "seqpos_slice",
    "exclude_special_tokens",
)
"""Fields of a run's config that change which vectors there are, or their values beyond
rounding."""
_OF_THE_PLAN = (
    "settings",
    "hook_names",
    "n_layers",
    "d_model",
    "weights_hash",
    "tokenizer_hash",
    "excluded_token_ids",
    "lens",
    "training_tokens",
    "store_batch_size_prompts",
    "tokens_per_shard",
    "tokens_per_block",
)
"""What decides every byte of a cache, up to rounding that differs between machines."""
_PACKAGES = ("sae-lens", "transformer-lens", "transformers", "torch", "safetensors")


@dataclass(frozen=True)
class ShardEntry:
    """One shard, as the manifest has it."""

    name: str
    """Its folder in the cache."""
    n_tokens: int
    n_bytes: int
    """Of its file of activations."""
    checksum: int
    """Of its list of checksums, which are those of its vectors."""
    tokens_checksum: int
    """Of its tokens and of which of them each vector belongs to."""


@dataclass(frozen=True)
class Manifest:
    """What is in a cache, and where it is from."""

    settings: dict[str, Any]
    """The fields of the config that change the vectors."""
    hook_names: list[str]
    n_layers: int
    """Blocks of the model."""
    d_model: int
    weights_hash: str
    tokenizer_hash: str | None
    excluded_token_ids: list[int]
    """Tokens without vectors, as `exclude_special_tokens` and the tokenizer say."""
    training_tokens: int
    """Tokens that were asked for; whole prompts are cached, and none after the end of
    the dataset."""
    store_batch_size_prompts: int
    """Prompts in a forward pass; vectors depend on it in their rounding."""
    tokens_per_shard: int
    tokens_per_block: int
    """Tokens that are read together, and have a checksum at each hook."""
    versions: dict[str, str]
    """Of the packages that made it; another one is no error."""
    dataset_split: str | None = None
    """As the dataset itself says."""
    lens: None = None
    """The vectors are those of the model, before any lens; an SAE applies its own."""
    format: int = FORMAT
    n_tokens: int = 0
    evaluation_checksum: int = 0
    shards: list[ShardEntry] | None = None
    """None while it is being harvested."""

    def to_json(self) -> str:
        """As text that `from_json` reads."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a cache.

        Raises:
            FileNotFoundError: If the folder has none.
            ValueError: If it is torn, or of another version of the format.
        """
        path = folder / MANIFEST_FILENAME
        if not path.is_file():
            check_no_lost_manifest(folder)
            raise FileNotFoundError(
                f"{folder} must be a cache of activations; it has no "
                f"{MANIFEST_FILENAME}. `sae-lens-multilayer cache` makes one."
            )
        values = read_json(path)
        if values.get("format") != FORMAT or set(values) != {
            f.name for f in fields(cls)
        }:
            raise ValueError(
                f"{path} must be of format {FORMAT} of this package; it has format "
                f"{values.get('format')} with the entries {sorted(values)}."
            )
        shards = values.pop("shards")
        if shards is not None:
            shards = [ShardEntry(**shard) for shard in shards]
        return cls(**values, shards=shards)

    @property
    def d_in(self) -> int:
        """Width of a vector."""
        return self.settings["d_in"]

    @property
    def dtype(self) -> str:
        """Of the vectors: "float32", "bfloat16" or "float16"."""
        return self.settings["dtype"]

    @property
    def bytes_per_token(self) -> int:
        """Of its vectors at all hooks."""
        return len(self.hook_names) * self.d_in * str_to_dtype(self.dtype).itemsize

    def differences_from_plan(self, plan: "Manifest") -> list[str]:
        """How this cache differs from one to be harvested; empty: in nothing."""
        return _differences(_plan(self), _plan(plan))

    def differences_from_run(
        self, cfg: MultiLayerConfig[Any], model: Any | None = None
    ) -> list[str]:
        """What a run needs otherwise than this cache has it; empty: nothing.

        Hooks that the run does without are no difference, nor is a dataset where the
        run names none.

        Args:
            model: The run's, if it has loaded one.
        """
        wanted = settings_of(cfg)
        if not wanted["dataset_path"]:
            del wanted["dataset_path"]
        if model is not None:
            wanted |= hashes_of(model)
        found = self.settings | {
            "weights_hash": self.weights_hash,
            "tokenizer_hash": self.tokenizer_hash,
        }
        lines = _differences(found, wanted)
        needed = cfg.resolve_hook_names(self.n_layers)
        missing = [name for name in needed if name not in self.hook_names]
        if missing:
            lines.append(f"the hooks {missing} are not in it; it has {self.hook_names}")
        return lines


def check_no_lost_manifest(folder: Path) -> None:
    """Raise FileNotFoundError if a folder has shards, but not what says of what."""
    if any(folder.glob(SHARD_FOLDERS)) and not (folder / MANIFEST_FILENAME).exists():
        raise FileNotFoundError(
            f"{folder} must have a {MANIFEST_FILENAME}, without which its shards are "
            "vectors of nobody knows what. Put it back from a copy, or delete the "
            "folder and harvest the cache again."
        )


def settings_of(cfg: MultiLayerConfig[Any]) -> dict[str, Any]:
    """The part of a config that a cache is checked against, as JSON gives it back."""
    plain = cfg.to_dict()
    settings = {name: plain[name] for name in _SETTINGS} | {
        "d_in": cfg.sae.d_in,
        "dtype": dtype_to_str(str_to_dtype(cfg.dtype)),
    }
    return json.loads(json.dumps(settings))


def hashes_of(model: Any) -> dict[str, str | None]:
    """What a model and its tokenizer are known by."""
    model = as_model(model)
    return {
        "weights_hash": model.weights_hash(),
        "tokenizer_hash": tokenizer_hash(model.tokenizer),
    }


def versions() -> dict[str, str]:
    """Of the packages that vectors depend on, and of this one."""
    found: dict[str, str] = {}
    for package in ("sae-lens-multilayer", *_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def explain(differences: Sequence[str]) -> str:
    """The differences as lines of a message."""
    return "".join(f"\n  {line}" for line in differences)


def _plan(manifest: Manifest) -> dict[str, Any]:
    values = {name: getattr(manifest, name) for name in _OF_THE_PLAN}
    return values.pop("settings") | values


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        f"`{name}`: {found[name]!r} in the cache, {value!r} here"
        for name, value in wanted.items()
        if found[name] != value
    ]
