"""`MultiLayerConfig`: SAELens' config plus the fields of a multi-layer run."""

import copy
import json
import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAEConfig
from sae_lens.config import T_TRAINING_SAE_CONFIG, SAETrainerConfig
from sae_lens.util import dtype_to_str, str_to_dtype
from tuned_lens import TunedLens
from typing_extensions import override

from sae_lens_multilayer import hooks
from sae_lens_multilayer.lens.config import Alignment, LensConfig
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.models.loading import usable_class
from sae_lens_multilayer.sae.config import (
    MultiLayerTrainingSAEConfig,
    check_sizes,
)

logger = logging.getLogger(__name__)

LATEST = "latest"
"""Value of `resume_from_checkpoint`: the newest checkpoint of the run."""

Role = Literal["model", "model run", "hooks", "vectors", "text", "reading", "cache",
    "data order", "training", "outputs", "reporting"]  # fmt: skip

_ROLES: dict[Role, str] = {
    # Which model is loaded; then where and how it is run, which changes rounding only.
    "model": "model_name model_class_name model_from_pretrained_kwargs",
    "model run": "llm_device compile_llm llm_compilation_mode",
    # Which activations of it the SAE is trained on.
    "hooks": "hook_name layers hook_names",
    "vectors": "model_kwargs autocast_lm hook_head_index",
    # Which prompts are made, and which of their tokens count; how they are read.
    "text": "dataset_path use_chat_formatting context_size prepend_bos "
    "sequence_separator_token disable_concat_sequences seqpos_slice "
    "exclude_special_tokens",
    "reading": "streaming dataset_trust_remote_code is_dataset_tokenized",
    "cache": "cached_activations_path",
    # In which batches, order and dtype tokens are served.
    "data order": "use_cached_activations store_batch_size_prompts n_batches_in_buffer "
    "activations_mixing_fraction act_store_device dtype seed",
    # An evaluation takes prompts that are then not trained on.
    "training": "sae lens lens_alignment standardize_stock_inputs "
    "from_pretrained_path training_tokens train_batch_size_tokens "
    "micro_batch_size_tokens lr lr_end lr_scheduler_name lr_warm_up_steps "
    "lr_decay_steps n_restart_cycles adam_beta1 adam_beta2 adam_eps max_grad_norm "
    "dead_feature_window dead_feature_threshold feature_sampling_window "
    "n_batches_for_norm_estimate device autocast compile_sae sae_compilation_mode "
    "n_eval_batches eval_batch_size_prompts",
    "outputs": "output_path checkpoint_path resume_from_checkpoint",
    "reporting": "logger verbose n_checkpoints keep_last_n_checkpoints "
    "save_final_checkpoint prefetch_llm_batches hook_eval sae_lens_version "
    "sae_lens_training_version",
}
"""What the fields of `MultiLayerConfig` decide; each field has one role."""


def fields_of(*roles: Role) -> list[str]:
    """Names of the fields with these roles."""
    return [name for role in roles for name in _ROLES[role].split()]


def fields_that_decide_weights() -> list[str]:
    """Names of the fields on which the trained weights depend."""
    others = ("outputs", "cache", "reporting")
    roles: list[Role] = [role for role in _ROLES if role not in others]
    return fields_of(*roles)


_COUNTS = ["training_tokens", "train_batch_size_tokens", "micro_batch_size_tokens",
    "context_size", "store_batch_size_prompts", "n_batches_in_buffer",
    "keep_last_n_checkpoints"]  # fmt: skip


@dataclass
class MultiLayerTrainerConfig(SAETrainerConfig):
    """The trainer's part of `MultiLayerConfig`; SAELens' "samples" are tokens here."""

    hook_names: list[str] = field(default_factory=list)
    micro_batch_size_tokens: int | None = None
    adam_eps: float = 6.25e-10
    max_grad_norm: float | None = None
    standardize_stock_inputs: bool = True
    keep_last_n_checkpoints: int | None = None

    @property
    @override
    def total_training_steps(self) -> int:
        """Steps of the run, a partial last one included (SAELens leaves it out)."""
        return math.ceil(self.total_training_samples / self.train_batch_size_samples)


def _default_sae() -> Any:  # of the type of a config's SAE, which is generic
    return MultiLayerTrainingSAEConfig(d_in=512, d_sae=64 * 512)


@dataclass
class MultiLayerConfig(LanguageModelSAERunnerConfig[T_TRAINING_SAE_CONFIG]):
    """Configuration for training one SAE on many layers of a language model.

    Fields of SAELens' `LanguageModelSAERunnerConfig` keep their meaning; tokens are
    counted in the text, each gives one activation vector per layer. The defaults are
    the recipe of Lawson et al. (2025), section 3, except sizes: Adam with a constant
    learning rate of 1e-4, no gradient clipping. Pass the config to `SAETrainingRunner`
    or `LanguageModelSAETrainingRunner` of SAELens.

    `sae` is a `MultiLayerTrainingSAEConfig` (the paper's TopK SAE) or any other SAELens
    training config, trained on the same activations.
    """

    sae: T_TRAINING_SAE_CONFIG = field(default_factory=_default_sae)
    """The SAE: sizes, sparsity and what else its architecture has."""
    hook_name: str = hooks.DEFAULT_HOOK_NAME
    """Template of the hook names; `{layer}` stands for the block number."""
    layers: list[int] | None = None
    """Blocks whose hook feeds the SAE, in the order of the layer axis; None: all."""
    hook_names: list[str] | None = None
    """Explicit hook names instead of `hook_name` and `layers`."""
    micro_batch_size_tokens: int | None = None
    """Tokens processed at a time; must divide `train_batch_size_tokens`. The update
    does not depend on it. A multi-layer SAE encodes this many vectors at a time, of one
    layer or of several, and holds `micro_batch_size_tokens` x `d_sae` pre-activations;
    a stock SAE takes all layers at once (BatchTopK selects its k over them). None: as
    many as fit the CPU's cache, at least 512; the whole batch for a stock SAE."""
    lens: TunedLens | LayerLens | str | Path | dict[str, Any] | None = None
    """The lens in whose space the multi-layer SAE is trained: a `LayerLens` of this
    run's hooks or its folder, a lens of tuned-lens, its folder or its name in
    tuned-lens' hub space, or the file of a Jacobian lens. It is saved with the SAE.
    None: no lens, or that of the checkpoint that the run starts from. The saved config
    holds the settings of a lens that was given as an object; a run from a checkpoint
    accepts these for the checkpoint's lens."""
    lens_alignment: Alignment = "tuned_lens"
    """Which translator a block's output uses: "tuned_lens", the one that was trained on
    it; "reference", the block's own, as in the paper's code."""
    lr: float = 1e-4
    adam_eps: float = 6.25e-10
    """Epsilon of Adam."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm; None: no clipping (SAELens itself clips to 1)."""
    standardize_stock_inputs: bool = True
    """Standardise the inputs of a stock architecture, as the scales of layers differ by
    orders of magnitude. True: each vector gets mean 0 and standard deviation 1, so all
    layers count the same in the loss, and the SAE is saved with
    `normalize_activations="layer_norm"`, which does the same at inference. False: raw
    vectors, with SAELens' own `normalize_activations`; large layers dominate."""
    use_cached_activations: bool = False
    """Train on cached activations; the model is loaded only if the run evaluates."""
    cached_activations_path: str | None = None
    """Folder that `sae-lens-multilayer cache` wrote (not SAELens' cache of one hook)"""
    resume_from_checkpoint: str | None = None
    """Folder of a checkpoint to resume from exactly; or "latest": the newest checkpoint
    of a run with these settings under `checkpoint_path`, or a new run if there is
    none."""
    keep_last_n_checkpoints: int | None = None
    """Newest checkpoints of this run to keep; older ones are deleted once a newer one
    is complete. None: all. The final one is not counted or deleted."""

    def __post_init__(self) -> None:
        hooks.check_hook_choice(self.hook_name, self.hook_names, self.layers)
        self.seqpos_slice = tuple(self.seqpos_slice)
        for name, value in vars(self).items():
            is_path = name.endswith("_path") or name == "resume_from_checkpoint"
            if is_path and value is not None:
                setattr(self, name, os.path.expanduser(os.fspath(value)))
        # JSON has lists only, no ranges or tuples.
        self.layers = None if self.layers is None else list(self.layers)
        self.hook_names = None if self.hook_names is None else list(self.hook_names)
        if isinstance(self.lens, (str, Path)):
            self.lens = os.path.expanduser(self.lens)
        hook_names = self.hook_names or [self.hook_name]
        self.model_class_name = usable_class(
            self.model_class_name, self.model_name, hook_names
        )
        self._check_run()
        self._check_sae()
        super().__post_init__()
        # Loaders accept the names of dtypes too, and JSON can hold them.
        for name in ("model_kwargs", "model_from_pretrained_kwargs"):
            plain = {
                key: dtype_to_str(value) if isinstance(value, torch.dtype) else value
                for key, value in getattr(self, name).items()
            }
            setattr(self, name, plain)
        try:  # now, as it is saved with the results of the run
            json.dumps(self.to_dict())
        except TypeError as error:
            raise ValueError(f"All settings must be JSON values: {error}.") from error

    def _check_run(self) -> None:
        check_sizes(self, [n for n in _COUNTS if getattr(self, n) is not None])
        for name in ("lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive; got {value}.")
        micro, batch = self.micro_batch_size_tokens, self.train_batch_size_tokens
        if micro is not None and batch % micro != 0:
            raise ValueError(
                "`train_batch_size_tokens` must be a multiple of "
                f"`micro_batch_size_tokens`; got {batch} and {micro}."
            )
        str_to_dtype(self.dtype)
        self._check_schedule()
        if self.resume_from_checkpoint == LATEST and self.checkpoint_path is None:
            raise ValueError(
                f"`checkpoint_path` must be given to resume from {LATEST!r}; got None."
            )
        if self.use_cached_activations and self.cached_activations_path is None:
            raise ValueError("`cached_activations_path` must be given; got None.")

    def _check_schedule(self) -> None:
        n_steps = math.ceil(self.training_tokens / self.train_batch_size_tokens)
        n_left = n_steps - self.lr_warm_up_steps - self.lr_decay_steps
        if self.lr_scheduler_name != "constant" and n_left < self.n_restart_cycles:
            raise ValueError(
                f"`lr_scheduler_name={self.lr_scheduler_name!r}` needs a step for each "
                f"of {self.n_restart_cycles} cycles; {n_left} of the run's {n_steps} "
                "are left beside `lr_warm_up_steps` and `lr_decay_steps`."
            )

    def _check_sae(self) -> None:
        sae: Any = self.sae
        if not isinstance(sae, TrainingSAEConfig):
            raise ValueError(
                "`sae` must be a training config, such as MultiLayerTrainingSAEConfig; "
                f"got {type(sae).__name__}."
            )
        check_sizes(self.sae, ["d_in", "d_sae"])
        k = getattr(self.sae, "k", None)
        if k is not None and not 0 < k <= self.sae.d_sae:
            raise ValueError(f"`k` must be in (0, d_sae = {self.sae.d_sae}]; got {k}.")
        if str_to_dtype(self.sae.dtype).itemsize < 4:
            logger.warning(
                "An SAE in %s loses most of its updates to rounding: train in float32 "
                "and convert it afterwards.",
                self.sae.dtype,
            )
        normalization, allowed = self.sae.normalize_activations, ("none", "layer_norm")
        if self.standardizes_stock_inputs and normalization not in allowed:
            raise ValueError(
                f"`normalize_activations` of a stock SAE must be in {allowed} when its "
                f"inputs are standardised; got {normalization!r}. Set "
                "`standardize_stock_inputs=False` to use it on raw vectors."
            )
        is_multi_layer = isinstance(self.sae, MultiLayerTrainingSAEConfig)
        if self.lens is not None and not is_multi_layer:
            raise ValueError(
                "`lens` needs a multi-layer SAE, as no stock class applies it; "
                f"got the architecture {self.sae.architecture()!r}."
            )

    @property
    def normalize_activations(self) -> str:
        """The setting of this name of the SAE that is trained and saved."""
        if self.standardizes_stock_inputs:
            return "layer_norm"
        return self.sae.normalize_activations

    @property
    def standardizes_stock_inputs(self) -> bool:
        """Whether this run trains a stock architecture on standardised vectors."""
        return self.standardize_stock_inputs and not isinstance(
            self.sae, MultiLayerTrainingSAEConfig
        )

    @property
    def named_model(self) -> tuple[str, str, dict[str, Any]]:
        """Class, name and arguments of the model, as in `models.loading`."""
        kwargs = self.model_from_pretrained_kwargs or {}
        return self.model_class_name, self.model_name, kwargs

    def resolve_hook_names(self, n_layers: int) -> list[str]:
        """Hook names of this run in a model of `n_layers` blocks, in order."""
        return hooks.resolve_hook_names(
            self.hook_name, self.hook_names, self.layers, n_layers, self.model_name
        )

    def replaced(self, **changes: Any) -> "MultiLayerConfig[T_TRAINING_SAE_CONFIG]":
        """A copy with other values; unlike `replace`, it keeps `checkpoint_path`."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def decisive_settings(self) -> dict[str, Any]:
        """Settings that decide the trained weights; the SAE's are named "sae.d_sae"."""
        values = self.to_dict()
        settings = {name: values[name] for name in fields_that_decide_weights()}
        sae = settings.pop("sae")
        # The metadata lists where the weights come from, and changes during the run.
        return settings | {f"sae.{n}": v for n, v in sae.items() if n != "metadata"}

    @override
    def to_dict(self) -> dict[str, Any]:
        """The config as values that JSON can hold."""
        plain, lens = copy.copy(self), self.lens
        if isinstance(lens, TunedLens):
            hook_names = self.resolve_hook_names(lens.config.num_hidden_layers)
            plain.lens = LensConfig.from_tuned_lens(
                lens.config, hook_names, self.lens_alignment
            ).to_dict()
        elif isinstance(lens, LayerLens):
            plain.lens = lens.config.to_dict()
        return LanguageModelSAERunnerConfig.to_dict(plain)

    @classmethod
    def from_dict(cls, cfg_dict: dict[str, Any]) -> "MultiLayerConfig[Any]":
        """Load a config from `to_dict`, also from its JSON."""
        if "seqpos_slice" in cfg_dict:  # JSON has no tuples
            cfg_dict = {**cfg_dict, "seqpos_slice": tuple(cfg_dict["seqpos_slice"])}
        config = super().from_dict(cfg_dict)
        assert isinstance(config, MultiLayerConfig)
        return config

    def to_sae_trainer_config(self) -> MultiLayerTrainerConfig:
        """The trainer's part; the runner adds the hook names."""
        return MultiLayerTrainerConfig(
            **vars(super().to_sae_trainer_config()),
            micro_batch_size_tokens=self.micro_batch_size_tokens,
            adam_eps=self.adam_eps,
            max_grad_norm=self.max_grad_norm,
            standardize_stock_inputs=self.standardizes_stock_inputs,
            keep_last_n_checkpoints=self.keep_last_n_checkpoints,
        )
