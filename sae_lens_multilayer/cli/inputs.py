"""The SAE, the model and the text that a command works on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAEMetadata
from safetensors import SafetensorError
from simple_parsing import field as option

from sae_lens_multilayer.analysis import first_position_warning
from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.models import loading
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import check_widths
from sae_lens_multilayer.published.loader import (
    has_published_files,
    own_or_mlsae_disk_loader,
)
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.prompts import Prompts
from sae_lens_multilayer.text.text import Text, check_n_tokens


@dataclass
class ModelOptions:
    """The language model; what is not given is taken from the SAE's metadata."""

    model_name: str | None = None
    """Name of the model, or a folder."""
    model_class_name: str | None = None
    """HookedTransformer, TransformerBridge (a Hugging Face folder, with the hook names
    of HookedTransformer) or AutoModelForCausalLM."""
    device: str = "cpu"
    """Device of the SAE and the model."""


@dataclass
class TextOptions:
    """The text; what is not given is taken from the SAE's metadata."""

    dataset_path: str | None = None
    """Name on the Hugging Face hub, or a file or folder, of text or tokens. Give
    held-out text to measure on text that was not trained on."""
    n_tokens: int = 65_536
    """Tokens of text, in whole prompts."""
    context_size: int | None = None
    """Tokens in a prompt."""
    batch_size_prompts: int = 8
    """Prompts in a forward pass of the model; no result depends on it."""
    exclude_special_tokens: bool | None = None
    """Exclude the tokenizer's special tokens."""


@dataclass
class SAEOptions:
    """The SAE."""

    sae: str = option(positional=True, metavar="sae")
    """Folder of a saved SAE or of published files, or the name of a release."""
    sae_id: str | None = None
    """Which SAE of a release."""


@dataclass
class Inputs:
    """The SAE, model and prompts that the options name."""

    sae: SAE[Any]
    model: Any
    text: Text
    prompts: Prompts
    """On the CPU."""

    @cached_property
    def token_texts(self) -> list[str]:
        """The text of each token of the vocabulary."""
        tokenizer = self.model.tokenizer
        return tokenizer.batch_decode([[i] for i in range(len(tokenizer))])

    def first_position_warning(
        self, exclude_positions: Sequence[int] = ()
    ) -> str | None:
        """See `analysis.first_position_warning`."""
        prompts = self.prompts[:8]
        if not prompts.counted[:, 0].any():
            return None
        names = hook_names_of(self.sae)
        return first_position_warning(self.model, names, prompts.ids, exclude_positions)

    def text_of(self, token_id: int) -> str:
        """The text of a token; its id if the tokenizer has none."""
        has_text = token_id < len(self.token_texts)
        return self.token_texts[token_id] if has_text else f"[{token_id}]"


def load_inputs(
    sae_options: SAEOptions, model_options: ModelOptions, text_options: TextOptions
) -> Inputs:
    """Load the SAE, the model and the prompts of a command.

    Raises:
        ValueError: If a setting is neither given nor in the metadata, or does not fit.
        OSError: If a file is missing.
    """
    check_n_tokens(text_options.n_tokens)
    _check_device(model_options.device)
    sae = load_sae(sae_options, model_options.device)
    text = text_of(sae.cfg.metadata, text_options)
    model = load_model(sae.cfg.metadata, model_options, hook_names=hook_names_of(sae))
    prompts = text.prompts(model, text_options.n_tokens)
    _check_widths(sae, model, prompts)
    return Inputs(sae, model, text, prompts)


@torch.no_grad()
def _check_widths(sae: SAE[Any], model: Any, prompts: Prompts) -> None:
    """Check the width of the SAE against the model's vectors at one position."""
    names, head = hook_names_of(sae), sae.cfg.metadata.hook_head_index
    vectors = as_model(model).vectors(prompts.ids[:1, :1], names, [head] * len(names))
    widths = {name: x.shape[-1] for name, x in zip(names, vectors, strict=True)}
    check_widths(widths, sae.cfg.d_in)


def text_of(metadata: SAEMetadata, options: TextOptions) -> Text:
    """The text of the options and, what they leave out, of the SAE's metadata."""
    return Text.from_metadata(
        metadata,
        dataset_path=options.dataset_path,
        context_size=options.context_size,
        exclude_special_tokens=options.exclude_special_tokens,
    )


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


def load_model(metadata: SAEMetadata, options: ModelOptions, **hooks: Any) -> Any:
    """Load the model of the options, or else of the SAE's metadata.

    Args:
        metadata: The SAE's.
        options: The given settings.
        hooks: `hook_name` or `hook_names` of the config; a Hugging Face model is loaded
            for these hooks.

    Raises:
        ValueError: If neither has a model name, or the model is unknown.
    """
    name = options.model_name or metadata.model_name
    class_name = (
        options.model_class_name or metadata.model_class_name or "HookedTransformer"
    )
    if name is None:
        raise ValueError("The SAE's metadata has no `model_name`: give --model_name.")
    # A model of another class or name has other arguments.
    is_same = (class_name, name) == (metadata.model_class_name, metadata.model_name)
    kwargs = metadata.model_from_pretrained_kwargs if is_same else None
    cfg = MultiLayerConfig(
        model_name=name,
        model_class_name=class_name,
        model_from_pretrained_kwargs=kwargs,
        device=options.device,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
        **hooks,
    )
    return loading.load_model(cfg)
