"""Options that commands share, and the SAE, model and text that they stand for."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from simple_parsing import field as option

from sae_lens_multilayer.analysis.first_position import first_position_warning
from sae_lens_multilayer.models.loading import check_device
from sae_lens_multilayer.published.saved_sae import check_model, load_model, load_sae
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.prompts import Prompts, Text

logger = logging.getLogger(__name__)


@dataclass
class SAEOptions:
    """The SAE."""

    sae: str = option(positional=True, metavar="sae")
    """Folder of a saved SAE or of published files, or the name of a release."""
    sae_id: str | None = None
    """Which SAE of a release."""


@dataclass
class ModelOptions:
    """The language model; settings not given are taken from the SAE's metadata."""

    model_name: str | None = None
    """Name of the model, or a folder."""
    model_class_name: str | None = None
    """HookedTransformer, TransformerBridge (with the same hook names) or
    AutoModelForCausalLM. Not needed for a folder: a TransformerBridge is loaded, or
    AutoModelForCausalLM if the SAE's hooks are module paths."""
    device: str = "cpu"
    """Device of the SAE and the model."""
    trust_remote_code: bool = False
    """Load the model with all arguments in the SAE's metadata, and run code in the
    model's repository. Only for SAEs and models that you trust."""

    def check_device(self) -> None:
        """Raise ValueError if the device cannot be used."""
        check_device("--device", self.device)

    def load(self, metadata: SAEMetadata, hook_names: Sequence[str] | None) -> Any:
        """Load the model of the options, or else of an SAE's metadata.

        Args:
            hook_names: Hooks to install on a Hugging Face model; None: all.
        """
        return load_model(
            metadata,
            hook_names,
            self.device,
            model_name=self.model_name,
            model_class_name=self.model_class_name,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass
class TextOptions:
    """The text; settings not given are taken from the SAE's metadata."""

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

    def text(self, metadata: SAEMetadata) -> Text:
        """The text of the options, or else of an SAE's metadata."""
        text = Text.from_settings(
            metadata,
            dataset_path=self.dataset_path,
            context_size=self.context_size,
            exclude_special_tokens=self.exclude_special_tokens,
        )
        logger.info("Reading the text %s", text.dataset_path)
        return text


@dataclass
class Inputs:
    """The SAE, model and prompts that the options stand for."""

    sae: SAE[Any]
    model: Any
    text: Text
    prompts: Prompts
    """On the CPU."""

    @classmethod
    def load(cls, options: Any) -> "Inputs":
        """Load the inputs of a command whose options have `sae`, `model` and `text`."""
        model_options: ModelOptions = options.model
        model_options.check_device()
        sae = load_sae(
            options.sae.sae,
            options.sae.sae_id,
            model_options.device,
            model_options.model_name,
        )
        metadata, names = sae.cfg.metadata, hook_names_of(sae)
        text = options.text.text(metadata)
        model = model_options.load(metadata, names)
        prompts = text.prompts(model, options.text.n_tokens)
        check_model(sae, model, prompts)
        return cls(sae, model, text, prompts)

    @cached_property
    def token_texts(self) -> list[str]:
        """The text of each token of the vocabulary."""
        tokenizer = self.model.tokenizer
        return tokenizer.batch_decode([[i] for i in range(len(tokenizer))])

    def text_of(self, token_id: int) -> str:
        """The text of a token; its id if the tokenizer has none."""
        has_text = token_id < len(self.token_texts)
        return self.token_texts[token_id] if has_text else f"[{token_id}]"

    def first_position_warning(self, excluded: Sequence[int] = ()) -> str | None:
        """See `analysis.first_position_warning`."""
        prompts = self.prompts[:8]
        if not prompts.counted[:, 0].any():
            return None
        names = hook_names_of(self.sae)
        return first_position_warning(self.model, names, prompts.ids, excluded)

    def warn_of_first_position(self, excluded: Sequence[int]) -> None:
        """Log a warning if the first position dominates averages."""
        if warning := self.first_position_warning(excluded):
            logger.warning("%s --exclude_positions 0 excludes it.", warning)
