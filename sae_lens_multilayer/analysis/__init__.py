"""Analyses of a multi-layer SAE across layers.

Each analysis is a function of an SAE, its model and tokens (or a store) that returns a
result, which becomes a table (`to_dataframe`), a folder (`save`, `load`) or pictures
(`pictures`). `analyze` runs several in one pass over the tokens; `Suite` runs those of
the table `ANALYSES` by name.
"""

from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.analysis.coactive import (
    CoactiveLatents,
    CoactiveSums,
    coactive_latents,
)
from sae_lens_multilayer.analysis.direct_logits import OutputTokens, output_tokens
from sae_lens_multilayer.analysis.distributions import (
    DistributionSums,
    LayerDistributions,
    PromptActs,
    layer_distributions,
    prompt_acts,
)
from sae_lens_multilayer.analysis.examples import Examples
from sae_lens_multilayer.analysis.first_position import first_position_warning
from sae_lens_multilayer.analysis.functional_layers import (
    FunctionalLayers,
    FunctionalLayerSums,
    functional_layers,
)
from sae_lens_multilayer.analysis.geometry import (
    DecoderSimilarity,
    TokenSimilarity,
    decoder_similarity,
    token_embeddings,
    token_similarity,
    token_unembeddings,
)
from sae_lens_multilayer.analysis.histograms import (
    ActHistograms,
    HistogramSums,
    act_histograms,
)
from sae_lens_multilayer.analysis.layer_counts import (
    ActiveLayerCounts,
    ActiveLayers,
    active_layers,
)
from sae_lens_multilayer.analysis.layer_variances import (
    Variances,
    VarianceSums,
    variances,
)
from sae_lens_multilayer.analysis.layers_by_class import (
    TokenClasses,
    TokenClassSums,
    token_classes,
)
from sae_lens_multilayer.analysis.max_activating import (
    ExampleCollector,
    SampleCollector,
    max_activating_examples,
    sampled_examples,
)
from sae_lens_multilayer.analysis.near_duplicates import Redundancy, redundancy
from sae_lens_multilayer.analysis.nulls import Null, RandomWeights
from sae_lens_multilayer.analysis.residual import ResidualStream, residual_stream
from sae_lens_multilayer.analysis.stream import (
    Accumulator,
    TokenStream,
    analyze,
)
from sae_lens_multilayer.analysis.suite import (
    ANALYSES,
    Analysis,
    Suite,
    load_results,
    save_results,
)
from sae_lens_multilayer.analysis.transfer import (
    Comparison,
    TransferMatrix,
    compare_with_single_layers,
    transfer_matrix,
)
from sae_lens_multilayer.results import Result

__all__ = [
    "ANALYSES",
    "Accumulator",
    "ActHistograms",
    "ActiveLayerCounts",
    "ActiveLayers",
    "Analysis",
    "CoactiveLatents",
    "CoactiveSums",
    "Comparison",
    "DecoderSimilarity",
    "DistributionSums",
    "ExampleCollector",
    "Examples",
    "FunctionalLayerSums",
    "FunctionalLayers",
    "HistogramSums",
    "LayerDistributions",
    "Null",
    "OutputTokens",
    "PromptActs",
    "RandomWeights",
    "Redundancy",
    "ResidualStream",
    "Result",
    "SampleCollector",
    "Suite",
    "TokenBatch",
    "TokenClassSums",
    "TokenClasses",
    "TokenSimilarity",
    "TokenStream",
    "TransferMatrix",
    "VarianceSums",
    "Variances",
    "act_histograms",
    "active_layers",
    "analyze",
    "coactive_latents",
    "compare_with_single_layers",
    "decoder_similarity",
    "first_position_warning",
    "functional_layers",
    "layer_distributions",
    "load_results",
    "max_activating_examples",
    "output_tokens",
    "prompt_acts",
    "redundancy",
    "residual_stream",
    "sampled_examples",
    "save_results",
    "token_classes",
    "token_embeddings",
    "token_similarity",
    "token_unembeddings",
    "transfer_matrix",
    "variances",
]
