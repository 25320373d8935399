"""The SAE, the model and the text that a command works on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE, LoggingConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAEMetadata
from safetensors import SafetensorError
from simple_parsing import field as option
from torch import Tensor

from sae_lens_multilayer import hooks
from sae_lens_multilayer.analysis import first_position_warning
from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.published.loader import (
    has_published_files,
    own_or_mlsae_disk_loader,
)
from sae_lens_multilayer.sae.config import MultiLayerTrainingSAEConfig
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.held_out import (
    check_n_tokens,
    excluded_token_ids,
    prompts_of_text,
)
from sae_lens_multilayer.training import run_model

_OF_TRAINING: dict[str, Any] = {
    "model_name": None,
    "model_class_name": "HookedTransformer",
    "dataset_path": None,
    "context_size": None,
    "prepend_bos": True,
    "sequence_separator_token": "bos",
}
"""What is as the SAE was trained unless an option says otherwise, and what it is where
the SAE does not say."""


@dataclass
class ModelOptions:
    """The language model; what is left out is what the SAE was trained on."""

    model_name: str | None = None
    """Name of the model, or a folder."""
    model_class_name: str | None = None
    """HookedTransformer, TransformerBridge (a Hugging Face folder, with the hook names
    of HookedTransformer) or AutoModelForCausalLM."""
    device: str = "cpu"
    """Where the SAE and the model go."""


@dataclass
class TextOptions:
    """The text; what is left out is as the SAE was trained."""

    dataset_path: str | None = None
    """Name on the Hugging Face hub, or a file or folder, of text or tokens. Held-out
    text, as the numbers are to be of text that was not trained on."""
    n_tokens: int = 65_536
    """Tokens of text, in whole prompts."""
    context_size: int | None = None
    """Tokens in a prompt."""
    batch_size_prompts: int = 8
    """Prompts in a forward pass of the model; no result depends on it."""
    exclude_special_tokens: bool | None = None
    """Leave out the tokenizer's special tokens."""


@dataclass
class SAEOptions:
    """The SAE."""

    sae: str = option(positional=True, metavar="sae")
    """Folder of a saved SAE or of published files, or the name of a release."""
    sae_id: str | None = None
    """Which SAE of a release."""


@dataclass
class Inputs:
    """What the options stand for."""

    sae: SAE[Any]
    model: Any
    tokens: Int[Tensor, "prompt pos"]
    """Prompts, on the CPU."""
    exclude_tokens: list[int] = field(default_factory=list)
    """Token ids that are left out."""

    @cached_property
    def token_texts(self) -> list[str]:
        """The text of each token of the vocabulary."""
        tokenizer = self.model.tokenizer
        return tokenizer.batch_decode([[i] for i in range(len(tokenizer))])

    def first_position_warning(
        self, exclude_positions: Sequence[int] = ()
    ) -> str | None:
        """See `analysis.first_position_warning`."""
        names, tokens = hook_names_of(self.sae), self.tokens[:8]
        return first_position_warning(self.model, names, tokens, exclude_positions)

    def text_of(self, token_id: int) -> str:
        """The text of a token; its number where the tokenizer has none."""
        known = token_id < len(self.token_texts)
        return self.token_texts[token_id] if known else f"[{token_id}]"


def load_inputs(
    sae_options: SAEOptions, model_options: ModelOptions, text_options: TextOptions
) -> Inputs:
    """Load what a command works on.

    Raises:
        ValueError: If something does not fit together, or is not said anywhere.
        OSError: If something is not there.
    """
    _check_device(model_options.device)
    sae = load_sae(sae_options, model_options.device)
    metadata = sae.cfg.metadata
    cfg = run_of(
        metadata,
        model_options,
        text_options,
        hook_names=hook_names_of(sae),
        hook_head_index=metadata.hook_head_index,
    )
    model, tokens = load_model_and_tokens(cfg, text_options, sae.cfg.d_in)
    special = text_options.exclude_special_tokens
    if special is None:
        special = metadata.exclude_special_tokens
    excluded = excluded_token_ids(special, model.tokenizer)
    return Inputs(sae, model, tokens, excluded)


def load_sae(options: SAEOptions, device: str) -> SAE[Any]:
    """Load an SAE from a folder, SAELens' own or of published files, or a release.

    Raises:
        FileNotFoundError: If there is neither, or a file is missing.
        ValueError: If the files are damaged.
    """
    if options.sae_id is not None:
        return SAE.from_pretrained(options.sae, options.sae_id, device=device)
    folder = Path(options.sae).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{options.sae} must be the folder of a saved SAE; it is not there. For a "
            "published one, name its release and give --sae_id."
        )
    if not has_published_files(folder):
        for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} must be the folder of a saved SAE; {name} is not there."
                )
    try:
        return SAE.load_from_disk(
            folder, device=device, converter=own_or_mlsae_disk_loader
        )
    except (SafetensorError, JSONDecodeError, KeyError, RuntimeError) as error:
        # What SAELens lets through of files that are torn or do not fit together.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{folder} must hold a whole SAE that SAELens can load; {reason}"
        ) from error


def _check_device(device: str) -> None:
    try:
        torch.zeros(1).to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}") from error


def load_model_and_tokens(
    cfg: MultiLayerConfig[Any], options: TextOptions, d_in: int | None = None
) -> tuple[Any, Int[Tensor, "prompt pos"]]:
    """A run's model, and the prompts of its text as its store makes them, on the CPU.

    Args:
        d_in: Width that the run's hooks must have; None: the residual stream's.

    Raises:
        ValueError: If the text is too short, or as the store.
    """
    check_n_tokens(options.n_tokens)
    model = run_model.load_any_model(cfg)
    width = hooks.shape_of_model(model).d_model if d_in is None else d_in
    # Of the SAE, the store looks at the width alone.
    cfg.sae = MultiLayerTrainingSAEConfig(d_in=width, d_sae=width, k=1)
    tokens = prompts_of_text(model, cfg, options.n_tokens, options.batch_size_prompts)
    return model, tokens


def run_of(
    metadata: SAEMetadata,
    model_options: ModelOptions,
    text_options: TextOptions,
    **changes: Any,
) -> MultiLayerConfig[Any]:
    """A run whose model and text are those of the options, or else of an SAE.

    Args:
        metadata: The SAE's.
        changes: Other fields of the run, which say what its hooks are.

    Raises:
        ValueError: If something is said by neither.
    """
    named = vars(model_options) | vars(text_options)
    settings: dict[str, Any] = {}
    for name, default in _OF_TRAINING.items():
        value = named.get(name)
        value = metadata[name] if value is None else value
        settings[name] = default if value is None else value
        if settings[name] is None:
            raise ValueError(f"It is not known which `{name}` to use: give --{name}.")
    # Of another class or name, the model takes other arguments.
    is_same = (settings["model_class_name"], settings["model_name"]) == (
        metadata.model_class_name,
        metadata.model_name,
    )
    return MultiLayerConfig(
        model_from_pretrained_kwargs=(
            metadata.model_from_pretrained_kwargs if is_same else None
        ),
        device=model_options.device,
        store_batch_size_prompts=1,
        n_batches_in_buffer=1,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
        **settings,
        **changes,
    )
