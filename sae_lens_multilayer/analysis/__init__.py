"""What a multi-layer SAE says about layers: the paper's analyses, and its readers'.

Each analysis is a function from an SAE, its model and tokens (or a store of them) to a
result, which becomes a table (`to_dataframe`), a folder (`save`, `load`) or a picture
(`sae_lens_multilayer.pictures`). `analyze` runs several in one pass over the tokens.
"""

from sae_lens_multilayer.analysis.distributions import (
    DistributionSums,
    LayerDistributions,
    PromptActs,
    layer_distributions,
    prompt_acts,
)
from sae_lens_multilayer.analysis.evaluated import Evaluation
from sae_lens_multilayer.analysis.examples import Examples
from sae_lens_multilayer.analysis.geometry import (
    DecoderSimilarity,
    TokenSimilarity,
    decoder_similarity,
    token_embeddings,
    token_similarity,
    token_unembeddings,
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
    max_activating_examples,
)
from sae_lens_multilayer.analysis.near_duplicates import Redundancy, redundancy
from sae_lens_multilayer.analysis.residual import (
    LayerMeans,
    ResidualStream,
    ResidualSums,
    residual_stream,
)
from sae_lens_multilayer.analysis.stream import (
    Accumulator,
    PassOptions,
    TokenBatch,
    TokenStream,
    analyze,
)
from sae_lens_multilayer.analysis.suite import Suite, load_results, save_results
from sae_lens_multilayer.analysis.transfer import (
    Comparison,
    TransferMatrix,
    compare_with_single_layers,
    transfer_matrix,
)

__all__ = [
    "Accumulator",
    "ActiveLayerCounts",
    "ActiveLayers",
    "Comparison",
    "DecoderSimilarity",
    "DistributionSums",
    "Evaluation",
    "ExampleCollector",
    "Examples",
    "LayerDistributions",
    "LayerMeans",
    "PassOptions",
    "PromptActs",
    "Redundancy",
    "ResidualStream",
    "ResidualSums",
    "Suite",
    "TokenBatch",
    "TokenClassSums",
    "TokenClasses",
    "TokenSimilarity",
    "TokenStream",
    "TransferMatrix",
    "VarianceSums",
    "Variances",
    "active_layers",
    "analyze",
    "compare_with_single_layers",
    "decoder_similarity",
    "layer_distributions",
    "load_results",
    "max_activating_examples",
    "prompt_acts",
    "redundancy",
    "residual_stream",
    "save_results",
    "token_classes",
    "token_embeddings",
    "token_similarity",
    "token_unembeddings",
    "transfer_matrix",
    "variances",
]
