"""All analyses by name, in as few passes over the tokens as they need."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer import hooks
from sae_lens_multilayer.analysis.active import check_latents
from sae_lens_multilayer.analysis.distributions import (
    DistributionSums,
    LayerDistributions,
)
from sae_lens_multilayer.analysis.evaluated import Evaluation
from sae_lens_multilayer.analysis.examples import Examples
from sae_lens_multilayer.analysis.geometry import (
    decoder_similarity,
    token_embeddings,
    token_similarity,
    token_unembeddings,
)
from sae_lens_multilayer.analysis.layer_counts import ActiveLayerCounts
from sae_lens_multilayer.analysis.layer_variances import VarianceSums
from sae_lens_multilayer.analysis.layers_by_class import token_classes
from sae_lens_multilayer.analysis.max_activating import ExampleCollector
from sae_lens_multilayer.analysis.near_duplicates import redundancy
from sae_lens_multilayer.analysis.residual import residual_stream
from sae_lens_multilayer.analysis.results import Result, kind_of
from sae_lens_multilayer.analysis.stream import (
    Accumulator,
    PassOptions,
    TokenStream,
    analyze,
)
from sae_lens_multilayer.analysis.transfer import (
    Comparison,
    single_layers_of,
    transfer_matrix,
)
from sae_lens_multilayer.evaluation.evaluation import evaluate
from sae_lens_multilayer.files import check_free
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.sae.views import hook_names_of

Analysis = Literal[
    "evaluation",
    "single_layer_comparison",
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
            single_layers: SAEs of one of its hooks each, for `single_layer_comparison`
                and `transfer_matrix`.
            options: See `PassOptions`.

        Raises:
            ValueError: If a latent is unknown, or as `single_layers_of`.
        """
        if latents is not None:
            check_latents(latents, sae.cfg.d_sae)
        self._sae, self._model, self._tokens = sae, model, tokens
        self._latents, self._n_examples = latents, n_examples
        self._single_layers = (
            single_layers_of(sae, single_layers) if single_layers else []
        )
        self._options = options

    def available(self) -> list[Analysis]:
        """The analyses that this SAE allows."""
        has_lens = any(map(lens_of, self._single_layers))
        of_heads = self._sae.cfg.metadata.hook_head_index is not None
        missing: set[Analysis] = set()
        if lens_of(self._sae) is None:
            missing.add("residual_stream_after_lens")
        if of_heads:
            missing.add("evaluation")
        if self._sae.cfg.d_in != hooks.shape_of_model(self._model).d_model:
            missing |= {"token_embeddings", "token_unembeddings"}
        if of_heads or not self._single_layers:
            missing.add("single_layer_comparison")
        if has_lens or not self._single_layers:
            missing.add("transfer_matrix")
        return [name for name in get_args(Analysis) if name not in missing]

    def run(
        self,
        names: Sequence[str] | None = None,
        known: Mapping[str, Result] = MappingProxyType({}),
    ) -> dict[str, Result]:
        """Run some of the analyses; those that can share a pass do.

        Args:
            names: Their names; None: all that are available.
            known: Results of the same SAE and tokens by name, which are not run again.

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
                "needs an SAE with a lens, the evaluation one of whole vectors, those "
                "of token embeddings one of their width, the comparison single-layer "
                "SAEs, and the transfer matrix such without a lens."
            )
        wanted = [n for n in available if names is None or n in names]
        results = dict(known)
        others = self._others(results)
        for name in wanted:
            if name not in results and name in others:
                results[name] = others[name]()
            elif name not in results:
                results |= self._shared_pass(wanted, results)
        return {name: results[name] for name in wanted}

    def _shared_pass(
        self, wanted: Sequence[str], known: Mapping[str, Result]
    ) -> dict[str, Result]:
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
        names = [name for name in makers if name in needed and name not in known]
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
            if "layer_distributions" not in results:
                results.update(self._shared_pass(["layer_distributions"], results))
            found = results["layer_distributions"]
            assert isinstance(found, LayerDistributions)
            return found

        def evaluation(saes: SAE[Any] | list[SAE[Any]]) -> Evaluation:
            excluded = options.get("exclude_tokens") or ()
            chosen: Any = {**options, "exclude_tokens": excluded}
            return Evaluation.of(evaluate(saes, model, tokens, **chosen))

        def comparison() -> Comparison:
            if "evaluation" not in results:
                results["evaluation"] = evaluation(sae)
            multi = results["evaluation"].to_dataframe()
            single = evaluation(self._single_layers).to_dataframe()
            return Comparison.of_tables(multi.loc[single.index], single)

        def latents() -> list[int]:
            if self._latents is not None:
                return list(self._latents)
            return most_active(distributions(), N_TOKEN_CLASS_LATENTS).tolist()

        return {
            "evaluation": lambda: evaluation(sae),
            "single_layer_comparison": comparison,
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


def load_results(folder: str | Path) -> dict[str, Result]:
    """Read what `save_results` wrote, by name.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a result is damaged, or of an unknown kind.
    """
    kinds = {cls.__name__: cls for cls in Result.__subclasses__()}
    found: dict[str, Result] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_dir():
            kind = kind_of(path)
            if kind not in kinds:
                raise ValueError(
                    f"{path} must hold one of {sorted(kinds)}; got {kind}."
                )
            found[path.name] = kinds[kind].load(path)
    return found


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
