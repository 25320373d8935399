"""All analyses by name, in as few passes over the tokens as they need."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.active import check_latents
from sae_lens_multilayer.analysis.active_layers import ActiveLayerCounts
from sae_lens_multilayer.analysis.distributions import (
    DistributionSums,
    LayerDistributions,
)
from sae_lens_multilayer.analysis.examples import Examples
from sae_lens_multilayer.analysis.geometry import (
    decoder_similarity,
    token_embeddings,
    token_similarity,
    token_unembeddings,
)
from sae_lens_multilayer.analysis.max_activating import ExampleCollector
from sae_lens_multilayer.analysis.redundancy import redundancy
from sae_lens_multilayer.analysis.residual import residual_stream
from sae_lens_multilayer.analysis.results import Result
from sae_lens_multilayer.analysis.stream import (
    Accumulator,
    PassOptions,
    TokenStream,
    analyze,
)
from sae_lens_multilayer.analysis.token_classes import token_classes
from sae_lens_multilayer.analysis.transfer import transfer_matrix
from sae_lens_multilayer.analysis.variances import VarianceSums
from sae_lens_multilayer.checkpoints import check_free
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.views import hook_names_of

Analysis = Literal[
    "layer_distributions",
    "variances",
    "active_layers",
    "max_activating_examples",
    "token_classes",
    "residual_stream",
    "residual_stream_after_lens",
    "decoder_similarity",
    "token_embeddings",
    "token_unembeddings",
    "redundancy",
    "transfer_matrix",
]
N_TOKEN_CLASS_LATENTS = 4
"""Latents whose token classes are looked at where none were chosen."""


class Suite:
    """Analyses of one SAE on the same tokens."""

    def __init__(
        self,
        sae: SAE[Any],
        model: Any,
        tokens: Int[Tensor, "prompt pos"],
        *,
        latents: Sequence[int] | None = None,
        n_examples: int = 8,
        single_layers: Sequence[SAE[Any]] = (),
        **options: Unpack[PassOptions],
    ) -> None:
        """Take what is to be analysed.

        Args:
            sae, model: As in `analyze`.
            tokens: Prompts.
            latents: Latents for `token_classes`; None: those with the largest sums of
                activations.
            n_examples: For `max_activating_examples`, of each latent at each layer.
            single_layers: SAEs of single layers, for `transfer_matrix`.
            options: See `PassOptions`.

        Raises:
            ValueError: If a latent is unknown.
        """
        if latents is not None:
            check_latents(latents, sae.cfg.d_sae)
        self._sae, self._model, self._tokens = sae, model, tokens
        self._latents, self._n_examples = latents, n_examples
        self._single_layers = list(single_layers)
        self._options = options

    def available(self) -> list[Analysis]:
        """The analyses that this SAE allows."""
        names: list[Analysis] = list(get_args(Analysis))
        if lens_of(self._sae) is None:
            names.remove("residual_stream_after_lens")
        if not self._single_layers:
            names.remove("transfer_matrix")
        return names

    def run(self, names: Sequence[str] | None = None) -> dict[str, Result]:
        """Run some of the analyses; those that can share a pass do.

        Args:
            names: Their names; None: all that are available.

        Returns:
            The result of each, by name, in the order of `Analysis`.

        Raises:
            ValueError: If a name is not available, or as the analyses.
        """
        available = self.available()
        unknown = [name for name in names or () if name not in available]
        if unknown:
            raise ValueError(
                f"Analyses must be among {available}; got {unknown}. One after a lens "
                "needs an SAE with a lens, and the transfer matrix single-layer SAEs."
            )
        wanted = [n for n in available if names is None or n in names]
        results = self._shared_pass(wanted)
        others = self._others(results)
        results |= {name: others[name]() for name in wanted if name in others}
        return {name: results[name] for name in wanted}

    def _shared_pass(self, wanted: Sequence[str]) -> dict[str, Result]:
        makers: dict[str, Callable[[], Accumulator[Any]]] = {
            "layer_distributions": lambda: DistributionSums(self._sae),
            "variances": lambda: VarianceSums(self._sae),
            "active_layers": lambda: ActiveLayerCounts(self._sae),
            "max_activating_examples": lambda: ExampleCollector(
                self._sae, self._n_examples
            ),
        }
        needed = set(wanted)
        if "redundancy" in wanted or (
            "token_classes" in wanted and self._latents is None
        ):
            needed.add("layer_distributions")
        names = [name for name in makers if name in needed]
        if not names:
            return {}
        accumulators = [makers[name]() for name in names]
        found = analyze(
            self._sae, self._model, self._tokens, *accumulators, **self._options
        )
        return dict(zip(names, found, strict=True))

    def _others(self, results: dict[str, Result]) -> dict[str, Callable[[], Result]]:
        sae, model, tokens, options = (
            self._sae,
            self._model,
            self._tokens,
            self._options,
        )
        hook_names, W_dec = hook_names_of(sae), sae.W_dec.detach()

        def distributions() -> LayerDistributions:
            found = results["layer_distributions"]
            assert isinstance(found, LayerDistributions)
            return found

        def latents() -> list[int]:
            if self._latents is not None:
                return list(self._latents)
            return most_active(distributions(), N_TOKEN_CLASS_LATENTS).tolist()

        return {
            "token_classes": lambda: token_classes(
                sae, model, tokens, latents(), **options
            ),
            "residual_stream": lambda: residual_stream(
                model, hook_names, tokens, **options
            ),
            "residual_stream_after_lens": lambda: residual_stream(
                model, hook_names, tokens, lens=lens_of(sae), **options
            ),
            "decoder_similarity": lambda: decoder_similarity(W_dec),
            "token_embeddings": lambda: token_similarity(
                W_dec, token_embeddings(model)
            ),
            "token_unembeddings": lambda: token_similarity(
                W_dec, token_unembeddings(model)
            ),
            "redundancy": lambda: redundancy(W_dec, distributions()),
            "transfer_matrix": lambda: transfer_matrix(
                self._single_layers, model, tokens, multi_layer=sae, **options
            ),
        }


def most_active(
    distributions: LayerDistributions, n_latents: int
) -> Int[Tensor, " latent"]:
    """The latents with the largest sums of activations, the largest first.

    No more than were active at all.
    """
    totals = distributions.totals.sum(0)
    n_active = int((distributions.counts.sum(0) > 0).sum())
    return totals.topk(min(n_latents, n_active)).indices


def save_results(
    results: dict[str, Result], folder: str | Path, tokenizer: Any = None
) -> None:
    """Write each result to the folder of its name.

    Args:
        folder: Where these folders go.
        tokenizer: For the text of examples.

    Raises:
        FileExistsError: If a result of a name is there already; nothing is written.
    """
    for name in results:
        check_free(Path(folder) / name)
    for name, result in results.items():
        path = Path(folder) / name
        if isinstance(result, Examples):
            result.save(path, tokenizer=tokenizer)
        else:
            result.save(path)


def first_position_ratio(
    model: Any, hook_names: Sequence[str], tokens: Int[Tensor, "prompt pos"]
) -> float:
    """How many times longer the vectors of first positions are than the others.

    The largest over layers of the ratio of mean L2 norms. Models attend to the first
    position when they have nothing to attend to; its vectors can be hundreds of times
    as long as others, so that they alone decide what is averaged over tokens.

    Raises:
        ValueError: If prompts have one position only.
    """
    if tokens.shape[1] < 2:
        raise ValueError(
            "Positions can be compared in prompts of two or more; got one."
        )
    sums = torch.zeros(2, len(hook_names), dtype=torch.float64)
    for batch in TokenStream(model, hook_names, tokens):
        norms = batch.x.norm(dim=-1).cpu().double()
        sums.index_add_(0, (batch.position > 0).long(), norms)
    first, rest = sums[0], sums[1] / (tokens.shape[1] - 1)
    return torch.nan_to_num(first / rest).max().item()
