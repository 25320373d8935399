"""One pass of a model over tokens for any number of analyses."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar, get_args, runtime_checkable

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import TypedDict, Unpack

from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.nulls import (
    BatchChange,
    LatentExchange,
    LayerShuffle,
    Null,
    RandomWeights,
)
from sae_lens_multilayer.evaluation.encoder import LayerEncoder
from sae_lens_multilayer.hooks import unknown_name
from sae_lens_multilayer.lens.carrier import check_lenses
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import check_widths
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.prompts import Tokens, take_prompts

_CALLS_FROM_USER = 7
"""`stacklevel` of a warning about the lens, from the caller of one analysis."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class Accumulator(Protocol[T_co]):
    """An analysis that processes the tokens batch by batch."""

    def update(self, batch: TokenBatch) -> None:
        """Add a batch of tokens; batches come in the order of the prompts."""

    def compute(self) -> T_co:
        """The result of all tokens so far."""
        ...


class PassOptions(TypedDict, total=False):
    """The tokens of a pass; a setting for all analyses of tokens is added here."""

    n_prompts: int | None
    """Prompts to take from a store; None: one model batch of it."""
    batch_size_prompts: int
    """Prompts in a forward pass, 8 by default; does not affect results."""
    exclude_tokens: Sequence[int] | None
    """Token ids whose positions are excluded; None: those that the store excludes."""
    exclude_positions: Sequence[int]
    """Positions in a prompt that are excluded, often 0; negative: from the end."""
    null: Null | None
    """Analyse a null: "random_weights" of the model, "shuffled_layers" of each token,
    or "matched_frequency": latents exchanged with others of about their frequency,
    which takes a second pass. See `analysis.nulls`."""


class TokenStream:
    """Iterates over batches of prompts with the model's vectors."""

    def __init__(
        self,
        model: Any,
        hook_names: Sequence[str],
        tokens: Tokens,
        *,
        encoder: LayerEncoder | None = None,
        sae: SAE[Any] | None = None,
        n_prompts: int | None = None,
        batch_size_prompts: int = 8,
        exclude_tokens: Sequence[int] | None = None,
        exclude_positions: Sequence[int] = (),
        null: str | None = None,
    ) -> None:
        """Check the model, the hooks and the tokens.

        Args:
            encoder: Encodes the vectors, for analyses of activations.
            sae: An SAE of the vectors' width; None: the encoder's, if there is one.
            n_prompts, batch_size_prompts, exclude_tokens, exclude_positions, null: See
                `PassOptions`.
        """
        if null is not None and null not in get_args(Null):
            raise unknown_name("There is no null", null, get_args(Null))
        sae = encoder.saes[0] if encoder is not None else sae
        self._d_in: int | None = None if sae is None else sae.cfg.d_in
        model = as_model(model)
        model.check_no_saes_attached()
        if self._d_in is not None:
            model.shape.check_width(hook_names, self._d_in)
        check_lenses(model, [] if sae is None else [sae], _CALLS_FROM_USER)
        model.own_hook_names(hook_names)
        head_index = None if sae is None else sae.cfg.metadata.hook_head_index
        self.hook_names = list(hook_names)
        self._model, self._encoder = model, encoder
        self._heads = [head_index] * len(self.hook_names)
        prompts = take_prompts(
            model,
            tokens,
            n_prompts,
            batch_size_prompts,
            exclude_tokens,
            exclude_positions,
        )
        self._batches = prompts.split(batch_size_prompts)
        self._null = null
        self._weights: Callable[[], AbstractContextManager[None]] = nullcontext
        if null == "random_weights":
            self._weights = RandomWeights(model.module).applied

    @torch.no_grad()
    def __iter__(self) -> Iterator[TokenBatch]:
        change = self._change()
        for batch in self._read("Analysing"):
            yield batch if change is None else change(batch)

    def _change(self) -> BatchChange | None:
        """What the null changes in each batch."""
        if self._null == "shuffled_layers":
            return LayerShuffle()
        if self._null != "matched_frequency" or self._encoder is None:
            return None
        counts = torch.zeros(self._encoder.saes[0].cfg.d_sae, dtype=torch.int64)
        for batch in self._read("Counting latents"):
            latents = batch.active.by_token.latent
            counts = counts.to(latents.device)
            counts += latents.bincount(minlength=len(counts))
        return LatentExchange(counts)

    def _read(self, description: str) -> Iterator[TokenBatch]:
        n_prompts = 0
        for prompts in tqdm(self._batches, desc=description, unit="batch"):
            ids, counted = prompts.ids.cpu(), prompts.counted.cpu()
            prompt, position = counted.nonzero(as_tuple=True)
            x = self._vectors(ids, prompt, position)
            yield TokenBatch(ids, n_prompts, prompt, position, x, self._encoder)
            n_prompts += len(prompts)

    def _vectors(
        self, prompts: Tensor, prompt: Tensor, position: Tensor
    ) -> Float[Tensor, "token layer d_in"]:
        with self._weights():
            by_hook = self._model.vectors(prompts, self.hook_names, self._heads)
        widths = dict(zip(self.hook_names, (v.shape[-1] for v in by_hook), strict=True))
        check_widths(widths, self._d_in or by_hook[0].shape[-1])
        device = by_hook[0].device
        where = prompt.to(device), position.to(device)
        return torch.stack([v.to(device)[where] for v in by_hook], dim=1)

    @torch.no_grad()
    def run(self, *accumulators: Accumulator[Any]) -> list[Any]:
        """Iterate once and return the result of each accumulator."""
        self._check_null(accumulators)
        n_tokens = 0
        for batch in self:
            n_tokens += len(batch.x)
            if len(batch.x):
                for accumulator in accumulators:
                    accumulator.update(batch)
        if n_tokens == 0:
            raise ValueError(
                "All tokens are excluded. Give other prompts or exclude fewer tokens."
            )
        return [accumulator.compute() for accumulator in accumulators]

    def _check_null(self, accumulators: Sequence[Accumulator[Any]]) -> None:
        for accumulator in accumulators:
            defined = getattr(accumulator, "nulls", get_args(Null))
            if self._null is not None and self._null not in defined:
                raise ValueError(
                    f"`null` of {type(accumulator).__name__} must be None or one of "
                    f"{list(defined)}; got {self._null!r}."
                )


def analyze(
    sae: SAE[Any],
    model: Any,
    tokens: Tokens,
    *accumulators: Accumulator[Any],
    **options: Unpack[PassOptions],
) -> list[Any]:
    """Run several analyses of an SAE in one pass over tokens.

    Each token is encoded once. Memory does not grow with the number of tokens.

    Args:
        sae: A multi-layer SAE, ours or a stock one trained by this package.
        model: The model that it was trained on, without SAEs attached.
        tokens: Prompts with their special tokens, `Prompts` with the positions that
            count, or a store to take them from.
        accumulators: The analyses, such as `DistributionSums(sae)`.

    Returns:
        The result of each accumulator, in order.

    Raises:
        ValueError: If SAE, model and tokens do not fit, all tokens are excluded, or an
            activation is negative or not finite.
    """
    encoder = LayerEncoder(sae, hook_names_of(sae))
    stream = TokenStream(model, encoder.hook_names, tokens, encoder=encoder, **options)
    return stream.run(*accumulators)


def single_analysis(accumulator: Callable[..., Accumulator[T]]) -> Callable[..., T]:
    """The function `f(sae, model, tokens, **options)` of one accumulator.

    Its options are those of `accumulator(sae, **options)` and `PassOptions`.
    """

    def run(sae: SAE[Any], model: Any, tokens: Tokens, *args: Any, **options: Any) -> T:
        names = [name for name in PassOptions.__annotations__ if name in options]
        of_pass: Any = {name: options.pop(name) for name in names}
        sums = accumulator(sae, *args, **options)
        return analyze(sae, model, tokens, sums, **of_pass)[0]

    run.__doc__ = accumulator.__doc__
    return run
