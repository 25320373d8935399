"""What a training run is told: the host's fields, and those of a multi-layer run."""

import copy
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.util import dtype_to_str, str_to_dtype
from tuned_lens import TunedLens
from typing_extensions import override

from sae_lens_multilayer import hooks
from sae_lens_multilayer.lens.config import Alignment, LensConfig
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.lens.tuned_lens_files import local_config
from sae_lens_multilayer.sae.config import (
    MultiLayerTrainingSAEConfig,
    check_sizes,
    check_whole_number,
)

logger = logging.getLogger(__name__)

T_TRAINING_SAE_CONFIG = TypeVar(
    "T_TRAINING_SAE_CONFIG", bound=TrainingSAEConfig, covariant=True
)

LATEST = "latest"
"""As `resume_from_checkpoint`: the newest checkpoint of the run."""

_PATHS = (
    "dataset_path",
    "output_path",
    "checkpoint_path",
    "resume_from_checkpoint",
    "from_pretrained_path",
    "cached_activations_path",
)
_WHOLE_NUMBERS = (
    "training_tokens",
    "train_batch_size_tokens",
    "micro_batch_size_tokens",
    "store_batch_size_prompts",
    "n_batches_in_buffer",
    "context_size",
    "keep_last_n_checkpoints",
)
_POSITIVE = (
    *_WHOLE_NUMBERS,
    "lr",
    "adam_eps",
    "max_grad_norm",
)


def _plain(value: Any) -> Any:
    return dtype_to_str(value) if isinstance(value, torch.dtype) else value


@dataclass
class MultiLayerTrainerConfig(SAETrainerConfig):
    """The part of `MultiLayerConfig` that the trainer needs.

    "Samples" in the host's fields are tokens here: each gives one activation vector per
    layer.
    """

    hook_names: list[str] = field(default_factory=list)
    micro_batch_size_tokens: int | None = None
    adam_eps: float = 6.25e-10
    max_grad_norm: float | None = None
    standardize_stock_inputs: bool = True
    keep_last_n_checkpoints: int | None = None


@dataclass
class MultiLayerConfig(LanguageModelSAERunnerConfig[T_TRAINING_SAE_CONFIG]):
    """Configuration for training one SAE on many layers of a language model.

    Every field of SAELens' `LanguageModelSAERunnerConfig` keeps its meaning; all counts
    of tokens are tokens of text, each of which gives one activation vector per layer.
    The defaults are the recipe of Lawson et al. (2025), section 3, except sizes: Adam
    with a constant learning rate of 1e-4, no gradient clipping. Pass it to
    `SAETrainingRunner` or `LanguageModelSAETrainingRunner` of SAELens.

    `sae` is a `MultiLayerTrainingSAEConfig` (the paper's TopK SAE) or any other SAELens
    training config, which then sees the same multi-layer stream.

    Raises:
        ValueError: If a value is out of range or two values contradict each other;
            before a model is loaded.
    """

    sae: T_TRAINING_SAE_CONFIG = field(  # type: ignore[assignment]
        default_factory=lambda: MultiLayerTrainingSAEConfig(d_in=512, d_sae=64 * 512)
    )
    hook_name: str = hooks.DEFAULT_HOOK_NAME
    """Template of the hook names; `{layer}` stands for the block number."""
    layers: list[int] | None = None
    """Blocks whose hook feeds the SAE, in the order of the layer axis; None: all."""
    hook_names: list[str] | None = None
    """Explicit hook names instead of `hook_name` and `layers`."""
    micro_batch_size_tokens: int | None = None
    """Tokens worked on at a time; must divide `train_batch_size_tokens`. The update
    does not depend on it. A multi-layer SAE takes one layer of them at a time and holds
    pre-activations of `micro_batch_size_tokens` x `d_sae`; a stock SAE takes all layers
    at once (and BatchTopK takes its k over them). None: as many as fit the cache, and
    512 at least, or the whole batch for a stock SAE."""
    tuned_lens: TunedLens | LayerLens | str | Path | dict[str, Any] | None = None
    """A lens in whose space the multi-layer SAE is trained: a lens of tuned-lens, a
    folder that it saved, its name in tuned-lens' hub space, or a `LayerLens` of this
    run's hooks. It is saved with the SAE and applied by everything that uses it. None:
    no lens, or that of the checkpoint that the run starts from. Saved with the run is
    the folder or name; of an object the settings (`LensConfig.to_dict()`), which stand
    for the lens of the checkpoint in a run that starts from one."""
    lens_alignment: Alignment = "tuned_lens"
    """Which translator a block's output uses: "tuned_lens", the one that was trained on
    it; "reference", the block's own, as in the paper's code. A run that starts from an
    SAE with a lens must have that of its lens."""
    lr: float = 1e-4
    adam_eps: float = 6.25e-10
    """Epsilon of Adam."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm; None: no clipping (SAELens itself clips to 1)."""
    standardize_stock_inputs: bool = True
    """How a stock architecture sees layers whose scales differ by orders of magnitude.
    True: each vector is given mean 0 and standard deviation 1 before the SAE, so every
    vector of every layer counts the same in its losses, and the SAE is saved with
    `normalize_activations="layer_norm"`, which does the same at inference. False: raw
    vectors, with SAELens' own `normalize_activations`; large layers dominate."""
    use_cached_activations: bool = False
    """Train on the vectors of a cache instead of the model's, which is then loaded only
    if the run evaluates."""
    cached_activations_path: str | None = None
    """Folder of a cache of activations of many hooks, as `sae-lens-multilayer cache`
    harvests it (not SAELens' cache of one hook)."""
    resume_from_checkpoint: str | None = None
    """A checkpoint's folder, to go on exactly where it was written; or "latest": the
    newest checkpoint of a run with these settings under `checkpoint_path`, in whose
    folder the run goes on, or a new run if there is none."""
    keep_last_n_checkpoints: int | None = None
    """Checkpoints of this run that stay, the newest; older ones are deleted once a
    newer one is complete. None: all. The final one neither counts nor goes."""

    def __post_init__(self) -> None:
        hooks.check_hook_choice(self.hook_name, self.hook_names, self.layers)
        self.seqpos_slice = tuple(self.seqpos_slice)
        for name in _PATHS:
            if getattr(self, name) is not None:
                path = os.path.expanduser(os.fspath(getattr(self, name)))
                setattr(self, name, path)
        # A range cannot be saved with the run, and a tuple comes back as a list.
        self.layers = None if self.layers is None else list(self.layers)
        self.hook_names = None if self.hook_names is None else list(self.hook_names)
        if isinstance(self.tuned_lens, (str, Path)):
            self.tuned_lens = os.path.expanduser(self.tuned_lens)
        self._check_sizes()
        self._check_sae()
        self._check_lens()
        super().__post_init__()
        # Loaders take the names of dtypes too, and JSON can hold them.
        for name in ("model_kwargs", "model_from_pretrained_kwargs"):
            kwargs: dict[str, Any] = getattr(self, name)
            setattr(self, name, {key: _plain(value) for key, value in kwargs.items()})
        self._check_saves()

    def _check_saves(self) -> None:
        """A run's config is saved with its results; find out now if it cannot be."""
        for name, value in self.to_dict().items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(
                    f"`{name}` must be of values that JSON can hold, since the config "
                    f"is saved with the SAE; {error}. Got {value!r}. Use plain "
                    "numbers and strings, such as 'bfloat16' for a dtype."
                ) from error

    def _check_sizes(self) -> None:
        for name in _WHOLE_NUMBERS:
            check_whole_number(name, getattr(self, name))
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive; got {value}.")
        if not 0 <= self.activations_mixing_fraction <= 1:
            raise ValueError(
                "`activations_mixing_fraction` must be in [0, 1]; got "
                f"{self.activations_mixing_fraction}."
            )
        if self.n_checkpoints < 0:
            raise ValueError(
                f"`n_checkpoints` must not be negative; got {self.n_checkpoints}."
            )
        if self.resume_from_checkpoint == LATEST and self.checkpoint_path is None:
            raise ValueError(
                f"`checkpoint_path` must be given to resume from {LATEST!r}; got None."
            )
        str_to_dtype(self.dtype)
        micro, batch = self.micro_batch_size_tokens, self.train_batch_size_tokens
        if micro is not None and batch % micro != 0:
            raise ValueError(
                "`train_batch_size_tokens` must be a multiple of "
                f"`micro_batch_size_tokens`; got {batch} and {micro}."
            )
        if self.use_cached_activations and self.cached_activations_path is None:
            raise ValueError(
                "`cached_activations_path` must be given to use cached activations; "
                "got None. `sae-lens-multilayer cache` harvests them."
            )

    def _check_sae(self) -> None:
        sae: Any = self.sae
        if not isinstance(sae, TrainingSAEConfig):
            raise ValueError(
                "`sae` must be a training config, such as MultiLayerTrainingSAEConfig; "
                f"got {type(sae).__name__}."
            )
        check_sizes(self.sae)
        k = getattr(self.sae, "k", None)
        if k is not None and not 0 < k <= self.sae.d_sae:
            raise ValueError(f"`k` must be in (0, d_sae = {self.sae.d_sae}]; got {k}.")
        if str_to_dtype(self.sae.dtype).itemsize < 4:
            logger.warning(
                "An SAE in %s loses most of its updates to rounding at small learning "
                "rates: train in float32 (the buffer's `dtype` may be bfloat16) and "
                "convert it afterwards.",
                self.sae.dtype,
            )
        normalization = self.sae.normalize_activations
        if self.standardizes_stock_inputs and normalization not in (
            "none",
            "layer_norm",
        ):
            raise ValueError(
                "`normalize_activations` of a stock SAE must be 'none' or 'layer_norm' "
                f"when its inputs are standardised; got {normalization!r}. Set "
                "`standardize_stock_inputs=False` to use it on raw vectors."
            )

    def _check_lens(self) -> None:
        """Check what is known of the lens without the hub."""
        if self.lens_alignment not in get_args(Alignment):
            raise ValueError(
                f"`lens_alignment` must be one of {get_args(Alignment)}; got "
                f"{self.lens_alignment!r}."
            )
        source: Any = self.tuned_lens
        if source is None:
            return
        if not isinstance(self.sae, MultiLayerTrainingSAEConfig):
            raise ValueError(
                "Only a multi-layer SAE can have a `tuned_lens`; no stock class would "
                f"apply it once it is saved. Got the architecture "
                f"{self.sae.architecture()!r}: leave out the lens, or use "
                "MultiLayerTrainingSAEConfig."
            )
        if not isinstance(source, (TunedLens, LayerLens, str, dict)):
            raise ValueError(
                "`tuned_lens` must be a TunedLens, a LayerLens, a folder or a name; "
                f"got {type(source).__name__}. `fit_tuned_lens` makes one."
            )
        stated = self._lens_config()
        if stated is not None:
            self.check_lens(stated)

    def _lens_config(self) -> LensConfig | None:
        """The settings of the lens; None if the hub must be asked for them."""
        source: Any = self.tuned_lens
        if isinstance(source, dict):
            return LensConfig.from_dict(source)
        if isinstance(source, LayerLens):
            return source.config
        stated = local_config(source)
        if stated is None:
            return None
        hook_names = self.resolve_hook_names(stated.num_hidden_layers)
        return LensConfig.from_tuned_lens(stated, hook_names, self.lens_alignment)

    def check_lens(self, lens: LensConfig) -> None:
        """Raise ValueError if a lens is not of this run's width, hooks or alignment."""
        lens.check_sae(self.sae.d_in, self.resolve_hook_names(lens.n_layers))
        if lens.alignment != self.lens_alignment:
            raise ValueError(
                f"`lens_alignment` must be that of the lens, {lens.alignment!r}; got "
                f"{self.lens_alignment!r}."
            )

    @property
    def normalize_activations(self) -> str:
        """What the SAE of this run says of its inputs, in training and once saved."""
        if self.standardizes_stock_inputs:
            return "layer_norm"
        return self.sae.normalize_activations

    @property
    def standardizes_stock_inputs(self) -> bool:
        """Whether this run trains a stock architecture on standardised vectors."""
        return self.standardize_stock_inputs and not isinstance(
            self.sae, MultiLayerTrainingSAEConfig
        )

    def resolve_hook_names(self, n_layers: int) -> list[str]:
        """Name the hooks of this run in the order of the layer axis.

        Args:
            n_layers: Number of blocks of the model.

        Raises:
            ValueError: If a layer is not in the model.
        """
        return hooks.resolve_hook_names(
            self.hook_name, self.hook_names, self.layers, n_layers, self.model_name
        )

    @override
    def to_dict(self) -> dict[str, Any]:
        """The config as values that JSON can hold."""
        plain = copy.copy(self)
        if isinstance(self.tuned_lens, (TunedLens, LayerLens)):
            stated = self._lens_config()
            assert stated is not None  # an object states its settings
            plain.tuned_lens = stated.to_dict()
        return LanguageModelSAERunnerConfig.to_dict(plain)

    @classmethod
    def from_dict(cls, cfg_dict: dict[str, Any]) -> "MultiLayerConfig[Any]":
        """Load a config from `to_dict`, also after a way through JSON."""
        if "seqpos_slice" in cfg_dict:
            # JSON has no tuples.
            cfg_dict = {**cfg_dict, "seqpos_slice": tuple(cfg_dict["seqpos_slice"])}
        config = super().from_dict(cfg_dict)
        assert isinstance(config, MultiLayerConfig)
        return config

    def to_sae_trainer_config(self) -> MultiLayerTrainerConfig:
        """The trainer's part of this config; the runner adds the hook names."""
        return MultiLayerTrainerConfig(
            **vars(super().to_sae_trainer_config()),
            micro_batch_size_tokens=self.micro_batch_size_tokens,
            adam_eps=self.adam_eps,
            max_grad_norm=self.max_grad_norm,
            standardize_stock_inputs=self.standardizes_stock_inputs,
            keep_last_n_checkpoints=self.keep_last_n_checkpoints,
        )
