"""The paper's claims, and how a study of a model tests them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sae_lens_multilayer.pictures import describe_sweep
from sae_lens_multilayer.pictures.description import Picture
from sae_lens_multilayer.results import Result
from sae_lens_multilayer.studies.comparison import ComparisonResult

LENS = "lens"
"""Name of the run with a lens."""
ANALYSES = (
    "layer_distributions",
    "variances",
    "active_layers",
    "decoder_similarity",
    "residual_stream",
)
"""Analyses of each multi-layer run."""


@dataclass
class PaperStudy:
    """What the study has found, read from its folder."""

    table: pd.DataFrame
    """A row for each multi-layer run, as `sweep` returns it."""
    default: dict[str, Result]
    """Results of the run with the default sizes."""
    lens: dict[str, Result]
    """The same with a lens; empty without one."""
    prompt: Result
    """`LayerDistributions` over the single prompt."""
    single_layers: ComparisonResult | None
    """The comparison with single-layer SAEs; None if these were not trained."""

    def claims(self) -> pd.DataFrame:
        """The paper's claims beside what this study measured.

        `holds` is True, False or None, which means that the study did not measure it.
        """
        rows = [(c.claim, c.source, *c.measure(self)) for c in CLAIMS]
        columns = pd.Index(["claim", "source", "holds", "measured"])
        return pd.DataFrame(rows, columns=columns)

    def pictures(self) -> dict[str, Picture]:
        """The figures by file name."""
        plain = self.table.drop(index=LENS, errors="ignore")
        found = {"sweep": describe_sweep(plain, ["expansion_factor", "k"])}
        found["prompt"] = self.prompt.pictures()[""]
        for suffix, results in (("", self.default), ("_lens", self.lens)):
            for name in ANALYSES:
                if name in results:
                    found[f"{name}{suffix}"] = results[name].pictures()[""]
        if self.single_layers is not None:
            found["single_layers"] = self.single_layers.pictures()["layers"]
        return found


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and how a study tests it."""

    claim: str
    source: str
    """Where the paper says so."""
    measure: Callable[[PaperStudy], tuple[bool | None, str]]
    """Whether it holds, None if unmeasured, and the numbers that decide."""


def _falls(column: str, along: str) -> Callable[[PaperStudy], tuple[bool | None, str]]:
    """Whether a column falls at each step along a size, the other one fixed."""

    def measure(study: PaperStudy) -> tuple[bool | None, str]:
        line = _along(study.table, along)
        if len(line) < 2:
            return None, f"one value of {along}"
        return bool((line[column].diff()[1:] < 0).all()), _values(line, column, along)

    return measure


def _ratio_grows(study: PaperStudy) -> tuple[bool | None, str]:
    line = _along(study.table, "expansion_factor")
    if len(line) < 2:
        return None, "one value of expansion_factor"
    values = line.latent_ratio.to_numpy()
    return bool(values[-1] > values[0]), _values(
        line, "latent_ratio", "expansion_factor"
    )


def _single_layers(study: PaperStudy) -> tuple[bool | None, str]:
    if study.single_layers is None:
        return None, "no single-layer SAEs"
    table = study.single_layers.to_dataframe().set_index("contestant")
    fvu, ce = (
        [table.loc[contestant, name] for contestant in ("mlsae", "single_layers")]
        for name in ("fvu_scalar", "delta_ce")
    )
    text = "FVU {:.3f} against {:.3f}, delta CE {:.3f} against {:.3f} nats"
    return bool(fvu[0] < 1.25 * fvu[1]), text.format(*fvu, *ce)


def _token_ratio(results: Mapping[str, Any], name: str) -> float:
    return float(results["variances"].summary[name])


def _two_orders(study: PaperStudy) -> tuple[bool | None, str]:
    ratio = _token_ratio(study.default, "reference_rel_var_t")
    return 10**-2.5 < ratio < 10**-1.5, f"ratio {ratio:.4f} (the paper's estimator)"


def _two_orders_exact(study: PaperStudy) -> tuple[bool | None, str]:
    ratio = _token_ratio(study.default, "token_ratio")
    return 10**-2.5 < ratio < 10**-1.5, f"ratio {ratio:.3f} (law of total variance)"


def _few_layers_at_a_token(study: PaperStudy) -> tuple[bool | None, str]:
    counts: Any = study.default["active_layers"]
    found = counts.mean_per_token.nanquantile(0.5).item()
    text = f"median over latents {found:.2f} of {len(counts.hook_names)} layers"
    return found < 2, text


def _lens_alike(study: PaperStudy) -> tuple[bool | None, str]:
    if not study.lens:
        return None, "no run with a lens"
    names = ("latent_ratio", "token_ratio")
    pairs = {
        n: [_token_ratio(r, n) for r in (study.default, study.lens)] for n in names
    }
    holds = all(0.5 < lens / plain < 2 for plain, lens in pairs.values())
    texts = [
        f"{n} {plain:.3f}, with lens {lens:.3f}" for n, (plain, lens) in pairs.items()
    ]
    return holds, "; ".join(texts)


def _adjacent(study: PaperStudy) -> tuple[bool | None, str]:
    stream: Any = study.default["residual_stream"]
    similarity = stream.to_dataframe().next_cos_sim.mean()
    return None, f"mean cosine similarity {similarity:.3f}; compare with other models"


CLAIMS = (
    Claim(
        "FVU falls as R grows", "section 4.1", _falls("fvu_scalar", "expansion_factor")
    ),
    Claim("FVU falls as k grows", "section 4.1", _falls("fvu_scalar", "k")),
    Claim(
        "The increase in cross-entropy falls as k grows",
        "section 4.1",
        _falls("delta_ce", "k"),
    ),
    Claim(
        "Reconstruction and loss are comparable to single-layer SAEs' (here: FVU at "
        "most 1.25 times theirs)",
        "section 4.1",
        _single_layers,
    ),
    Claim(
        "For a single token, a latent is often active at a single layer (here: fewer "
        "than 2 layers for half of all latents)",
        "abstract",
        _few_layers_at_a_token,
    ),
    Claim(
        "The variance over layers is about two orders of magnitude smaller at a single "
        "token than over tokens",
        "abstract",
        _two_orders,
    ),
    Claim("The same by the exact law of total variance", "abstract", _two_orders_exact),
    Claim("Latents are active at more layers as R grows", "section 4", _ratio_grows),
    Claim("Adjacent layers are more similar in larger models", "abstract", _adjacent),
    Claim(
        "With a tuned lens, the findings are qualitatively similar (here: ratios of "
        "variances within a factor of 2)",
        "abstract",
        _lens_alike,
    ),
)
"""The paper's claims, in its order; thresholds in brackets are this study's."""


def _along(table: pd.DataFrame, size: str) -> pd.DataFrame:
    """The runs over one size at the default of the other, without the lens."""
    other = "k" if size == "expansion_factor" else "expansion_factor"
    plain = table.drop(index=LENS, errors="ignore")
    line: Any = plain[plain[other] == plain[other].iloc[0]]
    return line.sort_values(size)


def _values(line: pd.DataFrame, column: str, along: str) -> str:
    pairs = zip(line[along], line[column], strict=True)
    return f"{column} by {along}: " + ", ".join(f"{x:g}: {y:.4g}" for x, y in pairs)
