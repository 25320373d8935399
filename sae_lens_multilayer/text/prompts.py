"""Text -> prompts to measure on, and which of their positions count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Int
from sae_lens.config import HfDataset
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.record import hash_of_tensors
from sae_lens_multilayer.text.dataset import resolve_dataset
from sae_lens_multilayer.text.stream import ResumableTokens


@dataclass(frozen=True, eq=False)
class Prompts:
    """Token ids, and which positions count."""

    ids: Int[Tensor, "prompt pos"]
    counted: Bool[Tensor, "prompt pos"]
    """Positions that do not count keep their own vectors when a layer is replaced, and
    are excluded from all averages."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: slice) -> "Prompts":
        return Prompts(self.ids[chosen], self.counted[chosen])

    def to(self, device: torch.device | str) -> "Prompts":
        """The same prompts on another device."""
        return Prompts(self.ids.to(device), self.counted.to(device))

    def split(self, batch_size: int) -> list["Prompts"]:
        """Batches of prompts; the last one may have fewer."""
        starts = range(0, len(self), batch_size)
        return [self[start : start + batch_size] for start in starts]

    @property
    def fingerprint(self) -> str:
        """Hash of the token ids and of which positions count."""
        return hash_of_tensors({"ids": self.ids, "counted": self.counted})


Tokens: TypeAlias = Int[Tensor, "prompt pos"] | Prompts | ActivationsStore
"""Prompts to measure on, or a store to take them from."""


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

    def __post_init__(self) -> None:
        check_at_least_one("context_size", self.context_size)

    @classmethod
    def from_config(cls, cfg: MultiLayerConfig[Any]) -> "Text":
        """The text of a training run."""
        return cls(**{field.name: getattr(cfg, field.name) for field in fields(cls)})

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any] | SAEMetadata, **given: Any
    ) -> "Text":
        """The text of a saved SAE or of settings of a run, with changes.

        Args:
            settings: An SAE's metadata or settings; what they lack has its default.
            given: Fields to use instead, unless they are None.
        """
        values = {name: value for name, value in given.items() if value is not None}
        for name in (field.name for field in fields(cls) if field.name not in values):
            # None is a value of `sequence_separator_token`: no separator.
            is_separator = name == "sequence_separator_token" and name in settings
            if is_separator or settings.get(name) not in (None, ""):
                values[name] = settings.get(name)
        for name in ("dataset_path", "context_size"):
            if name not in values:
                raise ValueError(f"The SAE's metadata has no `{name}`: give --{name}.")
        # JSON has no tuples.
        values["seqpos_slice"] = tuple(values.get("seqpos_slice", (None,)))
        return cls(**values)

    def load_dataset(self, dataset: HfDataset | None = None) -> HfDataset | str:
        """The dataset to read (or the given one), its rows fitted to the context."""
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
        """Read the contexts that a training store makes of this text."""
        lm = as_model(model)
        lm.shape.check_context_size(self.context_size, lm.name)
        excluded = self.excluded_token_ids(getattr(model, "tokenizer", None))
        own = ("dataset_path", "exclude_special_tokens")
        return ResumableTokens(
            model=model,
            dataset=self.load_dataset(dataset),
            exclude_special_tokens=torch.tensor(excluded, dtype=torch.long),
            **{name: value for name, value in vars(self).items() if name not in own},
            # The rest concerns the vectors, which are not read.
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
            n_tokens: Tokens of text, rounded up to whole prompts.
            dataset: Used instead of `dataset_path`.
        """
        check_at_least_one("n_tokens", n_tokens)
        reader = self.reader(model, dataset)
        ids, ended = next_rows(reader, -(-n_tokens // self.context_size))
        if ids is None:
            raise ValueError(
                f"The text must have a whole prompt of {self.context_size} tokens; it "
                "is shorter. Give more text or a smaller `context_size`."
            )
        if ended:
            n_there = len(ids)
            raise ValueError(
                f"`n_tokens` must be at most {n_there * self.context_size}, as the "
                f"text has {n_there} whole prompts of {self.context_size} tokens."
            )
        check_not_all_special(reader, ids)
        return mark_counted(reader, check_prompts(model, ids).cpu())

    def excluded_token_ids(self, tokenizer: Any) -> list[int]:
        """Token ids that `exclude_special_tokens` excludes."""
        if self.exclude_special_tokens is True:
            return get_special_token_ids(tokenizer)
        return list(self.exclude_special_tokens or [])


def counted_positions(
    ids: Int[Tensor, "prompt pos"],
    exclude_tokens: Sequence[int] | Tensor = (),
    exclude_positions: Sequence[int] = (),
    seqpos_slice: Sequence[int | None] = (None,),
) -> Bool[Tensor, "prompt pos"]:
    """Positions inside `seqpos_slice` that are not excluded by token id or position."""
    excluded = torch.as_tensor(exclude_tokens, dtype=ids.dtype, device=ids.device)
    counted = ~torch.isin(ids, excluded)
    inside = torch.zeros(ids.shape[1], dtype=torch.bool, device=ids.device)
    inside[slice(*seqpos_slice)] = True
    inside[list(exclude_positions)] = False
    return counted & inside


def mark_counted(
    source: Tokens,
    ids: Int[Tensor, "prompt pos"],
    exclude_tokens: Sequence[int] | None = None,
    exclude_positions: Sequence[int] = (),
) -> Prompts:
    """Prompts with the positions that count.

    Args:
        source: The source of `ids`. A store's `seqpos_slice` and the counted positions
            of `Prompts` apply as well.
        exclude_tokens: Token ids that do not count; None: those that a store excludes.
        exclude_positions: Positions that do not count; negative ones count from the
            end.
    """
    check_positions("exclude_positions", exclude_positions, ids)
    seqpos_slice: Sequence[int | None] = (None,)
    excluded: Sequence[int] | Tensor | None = exclude_tokens
    if isinstance(source, ActivationsStore):
        seqpos_slice = source.seqpos_slice
        excluded = source.exclude_special_tokens if excluded is None else excluded
    excluded = () if excluded is None else excluded
    counted = counted_positions(ids, excluded, exclude_positions, seqpos_slice)
    if isinstance(source, Prompts):
        counted &= source.counted
    return Prompts(ids, counted)


def check_not_all_special(
    reader: ActivationsStore, ids: Int[Tensor, "prompt pos"]
) -> None:
    """Raise ValueError if all tokens of some prompts are excluded by their ids."""
    excluded = reader.exclude_special_tokens
    if excluded is None or not torch.isin(ids.cpu(), excluded.cpu()).all():
        return
    tokenizer: Any = reader.model.tokenizer
    words = tokenizer.convert_ids_to_tokens(ids.flatten()[:8].tolist())
    raise ValueError(
        "Some tokens must not be special: `exclude_special_tokens` excludes all of "
        f"the first {ids.numel()} tokens, as the text became {words}. {len(excluded)} "
        f"ids are excluded, and the tokenizer has {len(tokenizer)}. Check that it has "
        "the words of the text, and not as special tokens; or set "
        "`exclude_special_tokens` to False or to a list of ids."
    )


def take_prompts(
    model: Any,
    tokens: object,
    n_prompts: int | None,
    batch_size_prompts: int,
    exclude_tokens: Sequence[int] | None = None,
    exclude_positions: Sequence[int] = (),
) -> Prompts:
    """The prompts to measure on, validated.

    Args:
        n_prompts: Prompts to take from a store; None: one model batch of it.
        batch_size_prompts: Only validated.
        exclude_tokens, exclude_positions: See `mark_counted`.
    """
    check_at_least_one("batch_size_prompts", batch_size_prompts)
    source: Any = tokens
    if isinstance(tokens, ActivationsStore):
        tokens = _take_from_store(tokens, n_prompts)
    elif n_prompts is not None:
        raise ValueError("`n_prompts` is what to take from a store; got prompts.")
    elif isinstance(tokens, Prompts):
        tokens = tokens.ids
    ids = check_prompts(model, tokens)
    return mark_counted(source, ids, exclude_tokens, exclude_positions)


def _take_from_store(
    store: ActivationsStore, n_prompts: int | None
) -> Int[Tensor, "prompt pos"]:
    n_wanted = store.store_batch_size_prompts if n_prompts is None else n_prompts
    check_at_least_one("n_prompts", n_wanted)
    prompts, ended = next_rows(store, n_wanted)
    if prompts is None or ended:
        n_left = 0 if prompts is None else len(prompts)
        raise ValueError(
            f"`n_prompts` must be at most {n_left}, the prompts left in the "
            f"store before its dataset repeats; got {n_wanted}."
        )
    return prompts


def next_rows(
    store: ActivationsStore, n_rows: int
) -> tuple[Int[Tensor, "prompt pos"] | None, bool]:
    """Up to `n_rows` prompts of a store's dataset, and whether it has ended."""
    rows: list[Tensor] = []
    try:
        while len(rows) < n_rows:
            # The end of an epoch would lose a larger batch, and its size too.
            rows.append(store.get_batch_tokens(1, raise_at_epoch_end=True))
    except StopIteration:
        return (torch.cat(rows) if rows else None), True
    return torch.cat(rows), False


def check_at_least_one(name: str, value: int) -> None:
    """Raise ValueError if the setting `name` is below 1."""
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1; got {value!r}.")


def check_positions(
    name: str, positions: Sequence[int], prompts: Int[Tensor, "prompt pos"]
) -> None:
    """Raise ValueError if the setting `name` has a position outside the prompts."""
    n_pos = prompts.shape[1]
    outside = [position for position in positions if not -n_pos <= position < n_pos]
    if outside:
        raise ValueError(
            f"`{name}` must be in [-{n_pos}, {n_pos}), as prompts have {n_pos} "
            f"tokens; got {outside}."
        )


def check_prompts(model: Any, tokens: object) -> Int[Tensor, "prompt pos"]:
    """Token ids as int64; ValueError if the model cannot run them."""
    if (
        not isinstance(tokens, Tensor)
        or tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8)
        or tokens.ndim != 2
        or tokens.numel() == 0
    ):
        shape = tuple(getattr(tokens, "shape", ()))
        found = f"{getattr(tokens, 'dtype', tokens)} of shape {shape}"
        raise ValueError(
            "`tokens` must be a tensor of token ids, integers of shape [prompt, pos] "
            f"with at least one prompt of at least one token; got {found:.80}."
        )
    prompts = tokens.long()
    as_model(model).check_tokens(prompts)
    return prompts
