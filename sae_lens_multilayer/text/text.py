"""What is tokenised and how, and which tokens count: of a run or of a saved SAE."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from sae_lens.config import HfDataset
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import get_special_token_ids

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.text.dataset import resolve_dataset
from sae_lens_multilayer.text.prompts import (
    Prompts,
    check_prompts,
    mark_counted,
    next_rows,
)
from sae_lens_multilayer.text.stream import ResumableTokens


@dataclass(frozen=True)
class Text:
    """What is tokenised and how, and which tokens count.

    The fields have the meaning of those of `MultiLayerConfig`. The training store of a
    config makes the same prompts as its `Text`.
    """

    context_size: int
    dataset_path: str = ""
    streaming: bool = True
    use_chat_formatting: bool = False
    prepend_bos: bool = True
    sequence_separator_token: int | Literal["bos", "eos", "sep"] | None = "bos"
    disable_concat_sequences: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    exclude_special_tokens: bool | list[int] = False

    @classmethod
    def from_config(cls, cfg: MultiLayerConfig[Any]) -> "Text":
        """The text of a training run."""
        return cls(**{field.name: getattr(cfg, field.name) for field in fields(cls)})

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], dataset_path: str) -> "Text":
        """The text of a run's settings, some of them left out, from another dataset."""
        given: dict[str, Any] = {
            field.name: settings.get(field.name, getattr(MultiLayerConfig, field.name))
            for field in fields(cls)
        }
        given["dataset_path"] = dataset_path
        given["seqpos_slice"] = tuple(given["seqpos_slice"])  # JSON has no tuples
        return cls(**given)

    @classmethod
    def from_metadata(cls, metadata: SAEMetadata, **given: Any) -> "Text":
        """The text that an SAE was trained on, with changes.

        Args:
            metadata: Of the SAE. A field that it lacks has its default here.
            given: Fields to use instead of the SAE's, unless they are None.

        Raises:
            ValueError: If `dataset_path` or `context_size` is given by neither.
        """
        settings = {name: value for name, value in given.items() if value is not None}
        for name in (field.name for field in fields(cls) if field.name not in settings):
            # None is a value of `sequence_separator_token`: no separator.
            is_separator = name == "sequence_separator_token" and name in metadata
            if is_separator or metadata[name] not in (None, ""):
                settings[name] = metadata[name]
        for name in ("dataset_path", "context_size"):
            if name not in settings:
                raise ValueError(f"The SAE's metadata has no `{name}`: give --{name}.")
        # JSON has no tuples.
        settings["seqpos_slice"] = tuple(settings.get("seqpos_slice", (None,)))
        return cls(**settings)

    def load_dataset(self, dataset: HfDataset | None = None) -> HfDataset | str:
        """The dataset to read, with rows that fit the context size.

        Args:
            dataset: Used instead of `dataset_path`.

        Raises:
            ValueError: If there is neither, or as `resolve_dataset`.
            FileNotFoundError: If the path does not exist.
        """
        if dataset is None and not self.dataset_path:
            raise ValueError("Give `dataset_path`, or a dataset.")
        return resolve_dataset(
            self.dataset_path if dataset is None else dataset,
            self.context_size,
            self.streaming,
            self.disable_concat_sequences,
            self.use_chat_formatting,
        )

    def reader(self, model: Any, dataset: HfDataset | None = None) -> ResumableTokens:
        """Read the contexts that a training store makes of this text.

        Raises:
            ValueError: If the context is too long for the model, or as `load_dataset`.
        """
        lm = as_model(model)
        lm.shape.check_context_size(self.context_size, lm.name)
        excluded = self.excluded_token_ids(getattr(model, "tokenizer", None))
        return ResumableTokens(
            model=model,
            dataset=self.load_dataset(dataset),
            streaming=self.streaming,
            context_size=self.context_size,
            prepend_bos=self.prepend_bos,
            sequence_separator_token=self.sequence_separator_token,
            disable_concat_sequences=self.disable_concat_sequences,
            use_chat_formatting=self.use_chat_formatting,
            seqpos_slice=self.seqpos_slice,
            exclude_special_tokens=torch.tensor(excluded, dtype=torch.long),
            # The rest is of the vectors, which are not read.
            hook_name="",
            hook_head_index=None,
            d_in=0,
            n_batches_in_buffer=1,
            total_training_tokens=0,
            store_batch_size_prompts=1,
            train_batch_size_tokens=1,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
        )

    def prompts(
        self, model: Any, n_tokens: int, dataset: HfDataset | None = None
    ) -> Prompts:
        """The first prompts of the text, on the CPU.

        Args:
            model: The model that will run them; its tokenizer is used.
            n_tokens: Tokens of text, rounded up to whole prompts.
            dataset: Used instead of `dataset_path`.

        Raises:
            ValueError: If the text is too short, or as `reader`.
        """
        check_n_tokens(n_tokens)
        reader = self.reader(model, dataset)
        ids, ended = next_rows(reader, -(-n_tokens // self.context_size))
        if ids is None or ended:
            n_there = 0 if ids is None else len(ids)
            raise ValueError(
                f"`n_tokens` must be at most {n_there * self.context_size}, as the "
                f"text has {n_there} whole prompts of {self.context_size} tokens; got "
                f"{n_tokens}. Give more text, or shorter prompts with `context_size`."
            )
        return mark_counted(reader, check_prompts(model, "the model", ids).cpu())

    def excluded_token_ids(self, tokenizer: Any) -> list[int]:
        """Token ids that `exclude_special_tokens` leaves out."""
        if self.exclude_special_tokens is True:
            return get_special_token_ids(tokenizer)
        return list(self.exclude_special_tokens or [])


def check_n_tokens(n_tokens: int) -> None:
    """Raise ValueError unless there is a token to measure on."""
    if n_tokens < 1:
        raise ValueError(f"`n_tokens` must be at least 1; got {n_tokens}.")
