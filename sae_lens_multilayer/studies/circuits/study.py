"""Circuits of a task: effects of all nodes, then scores of circuits of growing size."""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.hooks import find_hook
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.studies.circuits.curves import (
    COUNTS,
    SHARES,
    check_counts,
    check_shares,
    faithfulness,
)
from sae_lens_multilayer.studies.circuits.nodes import (
    ERROR,
    LayerNodes,
    check_sae,
    find_nodes,
)
from sae_lens_multilayer.studies.circuits.result import (
    Circuits,
    circuit_sizes,
    keep_masks,
)
from sae_lens_multilayer.studies.circuits.runs import run_circuits
from sae_lens_multilayer.studies.circuits.streams import (
    Ablation,
    Gradients,
    Method,
    Streams,
    check_choice,
    check_hooks,
    gradients,
)
from sae_lens_multilayer.studies.circuits.tasks import Task

Ranking = Literal["absolute", "signed"]

logger = logging.getLogger(__name__)


def circuits(
    sae: Any,
    model: Any,
    task: Task,
    *,
    layers: Sequence[int | str] | None = None,
    ablation: Ablation = "mean",
    method: Method = "integrated_gradients",
    n_steps: int = 10,
    shares: Sequence[float] = SHARES,
    counts: Sequence[int] = COUNTS,
    ranking: Ranking = "absolute",
    random_control: bool = True,
    n_bootstrap: int = 1000,
    seed: int = 0,
    batch_size_prompts: int = 16,
    max_prompts: int = 256,
    found_gradients: Gradients | None = None,
) -> Circuits:
    """Find the circuits of a task and measure how faithful they are.

    Args:
        sae: A multi-layer SAE, with or without a lens.
        model: The model that it was trained on.
        layers: Block numbers or hook names at which the stream is split into nodes;
            None: all hooks of the SAE.
        method: How effects are estimated; see `gradients`.
        n_steps: Of integrated gradients.
        shares: Kept shares of the nodes.
        counts: Numbers of nodes of further circuits, with which SAEs are compared that
            have different numbers of nodes; those above the SAE's are left out.
        ranking: Which nodes a circuit has: "absolute", those with the largest |effect|,
            or "signed", those whose ablation lowers the metric most; nodes that work
            against the task come last. MIB (arXiv:2504.13151) has its CPR from signed
            and its CMD from absolute effects.
        random_control: Also run circuits of random nodes.
        n_bootstrap: Samples of prompts for intervals.
        seed: Of the random nodes.
        batch_size_prompts: Prompts that are run together.
        max_prompts: Most prompts in one call of a block: circuits share batches.
        found_gradients: What `gradients` returned for the same task and hooks, which
            holds for any SAE; `method` and `n_steps` are not used then.

    Raises:
        ValueError: If the SAE is not a multi-layer SAE with these hooks, a hook is not
            at the residual stream, or the ablation does not change the metric.
    """
    names = chosen_hooks(sae, layers)
    check_shares(shares)
    check_counts(counts)
    check_choice("ablation", ablation, get_args(Ablation))
    check_choice("ranking", ranking, get_args(Ranking))
    lm = as_model(model)
    lm.check_no_saes_attached()
    lm.check_tokens(torch.cat([task.clean, task.corrupted]))
    streams = Streams.of(lm, task, names, batch_size_prompts)
    how: Any = {"ablation": ablation, "method": method, "n_steps": n_steps}
    how["batch_size_prompts"] = batch_size_prompts
    grads = found_gradients or gradients(lm, task, names, streams, **how)
    _check_gradients(grads, streams, names, ablation)
    nodes = find_nodes(sae, task, streams, grads, ablation, batch_size_prompts)
    columns = _columns(nodes)
    is_signed, effect = ranking == "signed", columns["effect"]
    gain = -effect if is_signed else effect.abs()  # an effect is that of the ablation
    order = gain.argsort(descending=True, stable=True)
    sizes = [*counts[: bisect_right(counts, len(order))]]
    is_error = columns["latent"] == ERROR
    chosen = _Chosen(order, is_error, shares, sizes, random_control, seed)
    at_once = {"batch_size_prompts": batch_size_prompts, "max_prompts": max_prompts}
    scores, full = run_circuits(lm, sae, task, nodes, chosen.keep, **at_once)
    found = chosen.by_name(scores, full)
    _warn_if_not_done(task.name, full, found["complements"][-1])
    return Circuits(
        task=task.name,
        ablation=ablation,
        method=grads.method,
        hook_names=names,
        classes=task.classes,
        k=sae.cfg.k,
        shares=list(shares),
        counts=sizes,
        ranking=ranking,
        n_bootstrap=n_bootstrap,
        full=full,
        **found,
        **{name: values[order] for name, values in columns.items()},
    )


def _warn_if_not_done(
    task: str, full: Float[Tensor, " prompt"], empty: Float[Tensor, " prompt"]
) -> None:
    if full.mean() < empty.mean():
        logger.warning(
            "m(M) = %.3f of the task %r is below m(empty) = %.3f nats: the model does "
            "the task worse than with all nodes ablated, so f does not tell how it is "
            "done.",
            *(full.mean(), task, empty.mean()),
        )


class _Chosen:
    """The circuits that are run."""

    def __init__(
        self,
        order: Int[Tensor, " node"],
        is_error: Bool[Tensor, " node"],
        shares: Sequence[float],
        counts: Sequence[int],
        random_control: bool,
        seed: int,
    ) -> None:
        sizes = circuit_sizes(shares, len(order))
        top = keep_masks(order, sizes)
        parts = {"scores": top, "complements": ~top}
        parts["by_count"] = keep_masks(order, counts)
        if random_control:
            generator = torch.Generator().manual_seed(seed)
            shuffled = torch.randperm(len(order), generator=generator)
            parts["random"] = keep_masks(shuffled, sizes)
        parts["latents_only"] = ~is_error.unsqueeze(0)
        parts["errors_only"] = is_error.unsqueeze(0)
        self._parts = parts
        self.keep: Bool[Tensor, "circuit node"] = torch.cat([*parts.values()])

    def by_name(
        self, scores: Float[Tensor, "circuit prompt"], full: Float[Tensor, " prompt"]
    ) -> dict[str, Tensor]:
        """The scores of each kind of circuit; ValueError if ablation has no effect."""
        split = scores.split([len(part) for part in self._parts.values()])
        found = dict(zip(self._parts, split, strict=True))
        found.setdefault("random", torch.full_like(found["scores"], torch.nan))
        for name in ("latents_only", "errors_only"):
            found[name] = found[name][0]
        empty = found["complements"][-1]
        faithfulness(found["scores"].numpy(), full.numpy(), empty.numpy())
        return found


def chosen_hooks(sae: Any, layers: Sequence[int | str] | None) -> list[str]:
    """The hooks of an SAE at these layers, in its order; see `circuits`."""
    names = list(sae.cfg.metadata.hook_names or [])
    check_sae(sae, names)
    if layers is not None:
        names = [names[i] for i in sorted({find_hook(names, one) for one in layers})]
    check_hooks(names)
    if not names:
        raise ValueError("Circuits need at least one layer; got none.")
    return names


def _columns(
    nodes: Sequence[LayerNodes],
) -> dict[str, Int[Tensor, " node"] | Float[Tensor, " node"]]:
    """Layer, class, latent and effect of the nodes of all hooks, in order."""
    layers = [torch.full_like(one.node_class, i) for i, one in enumerate(nodes)]
    if not sum(map(len, layers)):
        raise ValueError(
            "The prompts must differ; clean and ablated vectors are the same at all "
            "layers."
        )
    columns = {
        "layer": layers,
        "position_class": [one.node_class for one in nodes],
        "latent": [one.node_latent for one in nodes],
        "effect": [one.effect for one in nodes],
    }
    return {name: torch.cat(parts).cpu() for name, parts in columns.items()}


def _check_gradients(
    found: Gradients, streams: Streams, hook_names: list[str], ablation: str
) -> None:
    if (
        found.hook_names != hook_names
        or found.gradient.shape != streams.clean.shape
        or (found.method == "integrated_gradients" and found.ablation != ablation)
    ):
        raise ValueError(
            "`found_gradients` must be of the same task, hooks and ablation; got "
            f"{found.ablation!r}, shape {tuple(found.gradient.shape)}; needed "
            f"{ablation!r}, shape {tuple(streams.clean.shape)}."
        )
