"""The table of analyses, and `Suite`, which runs them by name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor
from typing_extensions import Unpack

from sae_lens_multilayer.analysis.active import check_latents
from sae_lens_multilayer.analysis.coactive import CoactiveSums
from sae_lens_multilayer.analysis.direct_logits import output_tokens
from sae_lens_multilayer.analysis.distributions import DistributionSums
from sae_lens_multilayer.analysis.functional_layers import FunctionalLayerSums
from sae_lens_multilayer.analysis.geometry import (
    decoder_similarity,
    token_embeddings,
    token_similarity,
    token_unembeddings,
)
from sae_lens_multilayer.analysis.histograms import HistogramSums
from sae_lens_multilayer.analysis.layer_counts import ActiveLayerCounts
from sae_lens_multilayer.analysis.layer_variances import VarianceSums
from sae_lens_multilayer.analysis.layers_by_class import TokenClasses, token_classes
from sae_lens_multilayer.analysis.max_activating import (
    ExampleCollector,
    SampleCollector,
)
from sae_lens_multilayer.analysis.near_duplicates import redundancy
from sae_lens_multilayer.analysis.residual import residual_stream
from sae_lens_multilayer.analysis.stream import Accumulator, PassOptions, analyze
from sae_lens_multilayer.analysis.transfer import (
    DRAWN,
    Comparison,
    single_layers_of,
    transfer_matrix,
)
from sae_lens_multilayer.evaluation.evaluation import evaluate
from sae_lens_multilayer.files import check_free
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.record import Record
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.sae.crosscoder import CrosscoderSAE, CrosscoderTrainingSAE
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.text.prompts import Prompts

_N_SAMPLED_EXAMPLES = 30
"""Of each latent, so that a fifth of them is a few."""
_N_TOKEN_CLASS_LATENTS = 4
"""Latents for `token_classes` if none are given: the most active ones."""


class Suite:
    """Analyses of one SAE on the same tokens; rows of `ANALYSES` read its attributes.

    Attributes:
        latents: Latents for `token_classes`; None: the most active ones.
        n_examples: Examples to keep for each latent and layer.
        single_layers: SAEs of one of the SAE's hooks each; given in any order, stored
            in that of the hooks.
        options: `PassOptions` of every pass.
    """

    def __init__(
        self,
        sae: SAE[Any],
        model: Any,
        tokens: Int[Tensor, "prompt pos"] | Prompts,
        *,
        latents: Sequence[int] | None = None,
        n_examples: int = 8,
        single_layers: Sequence[SAE[Any]] = (),
        **options: Unpack[PassOptions],
    ) -> None:
        if latents is not None:
            check_latents(latents, sae.cfg.d_sae)
        self.sae, self.model, self.tokens = sae, model, tokens
        self.latents, self.n_examples = latents, n_examples
        self.single_layers = single_layers_of(sae, single_layers)
        self.options: Any = {n: v for n, v in options.items() if v is not None}

    def missing(self, name: str) -> str | None:
        """What an analysis needs and this suite lacks; None if it is available."""
        if name not in ANALYSES:
            return "a row in ANALYSES"
        needs = ANALYSES[name].needs
        return next((n.description for n in needs if not n.is_met(self)), None)

    def available(self) -> list[str]:
        """Names of the analyses that can run."""
        return [name for name in ANALYSES if self.missing(name) is None]

    def run(
        self,
        names: Iterable[str] | None = None,
        known: Mapping[str, Result] = MappingProxyType({}),
    ) -> dict[str, Result]:
        """Run analyses; those with an accumulator share one pass over the tokens.

        Args:
            names: Keys of `ANALYSES`, whose order the results have; None: all that are
                available.
            known: Results by name for the same SAE and tokens, which are reused.
        """
        chosen = self.available() if names is None else list(names)
        missing = {name: self.missing(name) for name in chosen}
        if needs := [f"{n!r} needs {need}" for n, need in missing.items() if need]:
            raise ValueError(
                f"Not available: {', '.join(needs)}. Available: {self.available()}."
            )
        used = {name for user in chosen for name in ANALYSES[user].uses}
        results = dict(known)

        def result_of(name: str) -> Any:
            if name not in results:
                run = ANALYSES[name].run
                if run is None:
                    results.update(self._pass({name, *chosen, *used} - {*results}))
                else:
                    results[name] = run(self, result_of)
            return results[name]

        return {name: result_of(name) for name in ANALYSES if name in chosen}

    def _pass(self, names: set[str]) -> dict[str, Result]:
        """Results of the analyses with an accumulator, from one pass."""
        sums = {
            name: row.accumulator(self)
            for name, row in ANALYSES.items()
            if row.accumulator is not None and name in names
        }
        call: Any = (self.sae, self.model, self.tokens, *sums.values())
        return dict(zip(sums, analyze(*call, **self.options), strict=True))


ResultOf = Callable[[str], Any]
"""Returns the result of another analysis by its name, computed if necessary."""


@dataclass(frozen=True)
class Need:
    """Something that a suite may lack."""

    description: str
    is_met: Callable[[Suite], bool]


LENS = Need("an SAE with a lens", lambda suite: lens_of(suite.sae) is not None)
WHOLE_VECTORS = Need(
    "an SAE of whole vectors, not of one attention head",
    lambda suite: suite.sae.cfg.metadata.hook_head_index is None,
)
RESIDUAL_WIDTH = Need(
    "decoder rows of the residual stream's width",
    lambda suite: suite.sae.W_dec.shape[1] == as_model(suite.model).shape.d_model,
)
CROSSCODER = Need(
    "a crosscoder",
    lambda suite: isinstance(suite.sae, (CrosscoderSAE, CrosscoderTrainingSAE)),
)
NO_NULL = Need("no null", lambda suite: "null" not in suite.options)
SAME_LATENTS = Need(
    "no null that changes layers or latents",
    lambda s: s.options.get("null", "random_weights") in FunctionalLayerSums.nulls,
)
SINGLE_LAYERS = Need("single-layer SAEs", lambda suite: bool(suite.single_layers))
NO_SINGLE_LAYER_LENS = Need(
    "single-layer SAEs without a lens",
    lambda suite: all(lens_of(sae) is None for sae in suite.single_layers),
)


@dataclass(frozen=True)
class Analysis:
    """A row of `ANALYSES`: how an analysis runs and what it needs.

    Either `run` or `accumulator` is given. A setting for every analysis is an
    attribute of `Suite`, or an entry of `PassOptions` if it changes the tokens or their
    vectors.
    """

    run: Callable[[Suite, ResultOf], Result] | None = None
    """Computes the result."""
    accumulator: Callable[[Suite], Accumulator[Any]] | None = None
    """Creates an accumulator, which shares the pass over the tokens with others."""
    needs: tuple[Need, ...] = ()
    """The analysis is available if all are met."""
    uses: tuple[str, ...] = ()
    """Analyses with an accumulator whose result `run` may read."""
    table: Callable[[Any], pd.DataFrame] | None = None
    """Table of the result that the command `analyze` prints."""


def _single_layer_comparison(suite: Suite, result_of: ResultOf) -> Comparison:
    saes = suite.single_layers
    single = evaluate(saes, suite.model, suite.tokens, **suite.options).to_dataframe()
    return Comparison.of_tables(result_of("evaluation").to_dataframe(), single)


def _token_classes(suite: Suite, result_of: ResultOf) -> TokenClasses:
    latents = suite.latents
    if latents is None:
        dists = result_of("layer_distributions")
        latents = dists.most_active(_N_TOKEN_CLASS_LATENTS).tolist()
    return token_classes(suite.sae, suite.model, suite.tokens, latents, **suite.options)


def _residual_stream(suite: Suite, after_lens: bool) -> Result:
    names, lens = hook_names_of(suite.sae), lens_of(suite.sae) if after_lens else None
    return residual_stream(suite.model, names, suite.tokens, lens=lens, **suite.options)


def _transfer_matrix(suite: Suite, _: ResultOf) -> Result:
    call: Any = (suite.single_layers, suite.model, suite.tokens)
    return transfer_matrix(*call, multi_layer=suite.sae, **suite.options)


ANALYSES: dict[str, Analysis] = {
    "evaluation": Analysis(
        lambda s, _: evaluate(s.sae, s.model, s.tokens, **s.options),
        needs=(NO_NULL, WHOLE_VECTORS),
    ),
    "single_layer_comparison": Analysis(
        _single_layer_comparison,
        needs=(NO_NULL, WHOLE_VECTORS, SINGLE_LAYERS),
        table=lambda result: result.to_dataframe()[list(DRAWN)],
    ),
    "layer_distributions": Analysis(accumulator=lambda s: DistributionSums(s.sae)),
    "variances": Analysis(accumulator=lambda s: VarianceSums(s.sae)),
    "active_layers": Analysis(accumulator=lambda s: ActiveLayerCounts(s.sae)),
    "max_activating_examples": Analysis(
        accumulator=lambda s: ExampleCollector(s.sae, s.n_examples)
    ),
    "sampled_examples": Analysis(
        accumulator=lambda s: SampleCollector(s.sae, _N_SAMPLED_EXAMPLES)
    ),
    "act_histograms": Analysis(accumulator=lambda s: HistogramSums(s.sae)),
    "functional_layers": Analysis(
        accumulator=lambda s: FunctionalLayerSums(s.sae),
        needs=(CROSSCODER, SAME_LATENTS),
    ),
    "coactive_latents": Analysis(accumulator=lambda s: CoactiveSums(s.sae)),
    "token_classes": Analysis(_token_classes, uses=("layer_distributions",)),
    "residual_stream": Analysis(lambda s, _: _residual_stream(s, after_lens=False)),
    "residual_stream_after_lens": Analysis(
        lambda s, _: _residual_stream(s, after_lens=True), needs=(LENS,)
    ),
    "decoder_similarity": Analysis(lambda s, _: decoder_similarity(s.sae.W_dec)),
    "token_embeddings": Analysis(
        lambda s, _: token_similarity(s.sae.W_dec, token_embeddings(s.model)),
        needs=(RESIDUAL_WIDTH,),
    ),
    "token_unembeddings": Analysis(
        lambda s, _: token_similarity(s.sae.W_dec, token_unembeddings(s.model)),
        needs=(RESIDUAL_WIDTH,),
    ),
    "output_tokens": Analysis(
        lambda s, _: output_tokens(s.sae, s.model), needs=(RESIDUAL_WIDTH,)
    ),
    "redundancy": Analysis(
        lambda s, result_of: redundancy(s.sae.W_dec, result_of("layer_distributions")),
        uses=("layer_distributions",),
    ),
    "transfer_matrix": Analysis(
        _transfer_matrix, needs=(SINGLE_LAYERS, NO_SINGLE_LAYER_LENS)
    ),
}
"""All analyses by name, in the order in which they run.

A new analysis is a `Result`, a function or an accumulator for it, and a row here. Code
outside of the package adds its row before it calls `Suite` or the command line (see
`examples/own_analysis.py`). The report shows `Result.pictures`, a sweep's table has
`Result.numbers`:

    ANALYSES["loudness"] = Analysis(lambda suite, _: loudness(suite.sae))
"""


def save_results(
    results: Mapping[str, Result], folder: str | Path, tokenizer: Any = None
) -> None:
    """Write each result to a folder of its name in `folder`, as `Result.save`; nothing
    if one of them exists."""
    for name in results:
        check_free(Path(folder) / name)
    for name, result in results.items():
        result.save(Path(folder) / name, tokenizer=tokenizer)


def load_results(folder: str | Path) -> dict[str, Result]:
    """Read what `save_results` wrote, by name."""
    kinds = Result.kinds()
    found: dict[str, Result] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_dir():
            kind = Record.read(path).kind
            if kind not in kinds:
                raise ValueError(
                    f"{path} must hold one of {sorted(kinds)}; got {kind}."
                )
            found[path.name] = kinds[kind].load(path)
    return found
