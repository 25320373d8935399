"""Attribution graphs of one prompt, in the JSON that circuit viewers read.

The schema is that of circuit-tracer and Neuronpedia: `metadata`, `qParams`, `nodes` and
`links`, with the fields that either needs. A latent has the same `feature` at every
layer, as the dictionary is shared; `feature_type` has the names that viewers know
("cross layer transcoder" for latents).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_multilayer.files import write_whole
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.pictures.description import short_labels
from sae_lens_multilayer.record import package_versions
from sae_lens_multilayer.studies.circuits.nodes import (
    ERROR,
    LayerNodes,
    encode,
    find_nodes,
    node_effects,
)
from sae_lens_multilayer.studies.circuits.streams import (
    Gradients,
    Method,
    Streams,
    depth_of,
    gradients,
)
from sae_lens_multilayer.studies.circuits.study import chosen_hooks
from sae_lens_multilayer.studies.circuits.tasks import Task
from sae_lens_multilayer.studies.interventions.edits import pre_acts

_PACKAGE = "sae-lens-multilayer"
_LATENT = "cross layer transcoder"


@dataclass
class _Chosen:
    """The nodes of the graph at one hook."""

    position: Int[Tensor, " node"]
    latent: Int[Tensor, " node"]
    """-1: the error."""
    vector: Float[Tensor, "node d_in"]
    """What the node adds to the stream: `v_j A^-1 W_dec[j]`, or r."""
    act: Float[Tensor, " node"]
    """Activation in the SAE's units; NaN for errors."""
    effect: Float[Tensor, " node"]


def attribution_graph(
    sae: Any,
    model: Any,
    task: Task,
    *,
    layers: Sequence[int | str] | None = None,
    prompt: int = 0,
    n_nodes: int = 60,
    slug: str = "circuit",
) -> dict[str, Any]:
    """The nodes with the largest effects in one clean prompt, and what links them.

    Effects are those of attribution patching from the clean prompt to its corrupted
    one.

    The weight of a link is the direct effect of its source: the gradient of the
    target's pre-activation (or logit) by the source's activation, times the activation.
    As every path passes through the next hooked layer, direct means from one hooked
    layer to the next, through the blocks between them; tokens are linked to the first
    and the last is linked to logits. Gradients are full ones: attention and norms are
    not frozen, unlike in circuit-tracer. Errors have no links into them. `influence` is
    the share of the sum of |effect| of the nodes that have at least as large an effect,
    so that viewers prune by it.

    Args:
        layers: See `circuits`.
        prompt: Index of the prompt in the task.
        n_nodes: Nodes beside tokens and logits.
        slug: Name of the graph.

    Raises:
        ValueError: If the task has no such prompt, or the model cannot be run block by
            block.
    """
    lm, names = as_model(model), chosen_hooks(sae, layers)
    if not 0 <= prompt < len(task):
        raise ValueError(
            f"`prompt` must be in [0, {len(task)}), the prompts of {task.name!r}; got "
            f"{prompt}."
        )
    one = _of_prompt(task, prompt)
    streams = Streams.of(lm, one, names, 1)
    method: Method = "attribution_patching"
    found = gradients(lm, one, names, streams, ablation="resample", method=method)
    nodes = find_nodes(sae, one, streams, found, "resample", 1)
    chosen = _choose(sae, streams, found, nodes, n_nodes)
    targets = _targets(lm, one)
    links = _Links(sae, lm, one, names, chosen).all(targets)
    return {
        "metadata": _metadata(lm, one, slug),
        "qParams": {
            "linkType": "both",
            "pinnedIds": [],
            "supernodes": [],
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": _nodes(lm, one, names, chosen, targets),
        "links": [
            {"source": source, "target": target, "weight": weight}
            for source, target, weight in links
        ],
    }


def save_graph(graph: dict[str, Any], path: str | Path) -> None:
    """Write a graph as JSON."""
    write_whole(Path(path), json.dumps(graph, indent=1))


def _of_prompt(task: Task, prompt: int) -> Task:
    rows = slice(prompt, prompt + 1)
    columns = task.clean, task.corrupted, task.is_correct, task.is_wrong
    clean, corrupted, correct, wrong = (one[rows] for one in columns)
    return Task(
        task.name, clean, corrupted, task.positions, task.candidates, correct, wrong
    )


def _choose(
    sae: Any,
    streams: Streams,
    found: Gradients,
    layers: Sequence[LayerNodes],
    n_nodes: int,
) -> list[_Chosen]:
    """The active latents and errors with the largest |effect| at a position."""
    by_layer: list[_Chosen] = []
    for i, layer in enumerate(layers):
        x = streams.clean[i].to(sae.device, sae.dtype)
        grad = found.gradient[i].to(x)
        latents = encode(sae, x, layer.hook)
        values = latents.columns(layer.column_of, len(layer.latents))
        args = values, layer.ablated_values(slice(0, 1)), x, grad, slice(0, 1)
        effects = node_effects(layer, *args)[0]
        error = x[0] - values[0] @ layer.directions
        is_node = torch.cat([values[0] != 0, torch.ones_like(error[:, :1] != 0)], 1)
        position, column = is_node.nonzero(as_tuple=True)
        name = torch.cat([layer.latents, layer.latents.new_tensor([ERROR])])[column]
        is_error = name == ERROR
        inside = column.clamp(max=len(layer.latents) - 1)
        v = values[0, position, inside]
        vector = v.unsqueeze(1) * layer.directions[inside]
        vector = torch.where(is_error.unsqueeze(1), error[position], vector)
        std = sae.encode_topk(x, layer.hook).std[0, position, 0]
        act = torch.where(is_error, torch.nan, v / std)
        effect = effects[position, column]
        by_layer.append(_Chosen(position, name, vector, act, effect))
    sizes = torch.cat([one.effect.abs() for one in by_layer])
    least = sizes.topk(min(n_nodes, len(sizes))).values[-1]
    return [_part(one, one.effect.abs() >= least) for one in by_layer]


def _part(one: _Chosen, kept: Tensor) -> _Chosen:
    columns = one.position, one.latent, one.vector, one.act, one.effect
    return _Chosen(*(column[kept] for column in columns))


@torch.no_grad()
def _targets(lm: Any, task: Task) -> list[tuple[int, float]]:
    """The likeliest correct and the likeliest wrong token, with probabilities."""
    probs = lm.logits(task.clean)[0, -1].float().softmax(-1).cpu()
    own = probs[task.candidates]
    found = [
        int(task.candidates[own.masked_fill(~mask[0], -1).argmax()])
        for mask in (task.is_correct, task.is_wrong)
    ]
    return [(token, float(probs[token])) for token in found]


class _Links:
    """Direct effects, from one hooked layer to the next."""

    def __init__(
        self, sae: Any, lm: Any, task: Task, names: list[str], chosen: list[_Chosen]
    ) -> None:
        self._sae, self._lm, self._names, self._chosen = sae, lm, names, chosen
        self._ids = task.clean[0].tolist()
        self._walk = lm.walk(task.clean)

    @torch.enable_grad()
    def all(self, targets: list[tuple[int, float]]) -> list[tuple[str, str, float]]:
        """Source, target and weight of each link."""
        lm, labels = self._lm, short_labels(self._names)
        leaf = self._walk.residual.detach().requires_grad_()
        sources = self._tokens(leaf)
        links: list[tuple[str, str, float]] = []
        depth = 0
        for i, (name, one) in enumerate(zip(self._names, self._chosen, strict=True)):
            x = self._run(leaf, depth, depth_of(name))
            is_latent = one.latent != ERROR
            of, at = one.latent[is_latent], one.position[is_latent]
            rows = x[0, at.to(x.device)].to(self._sae.device)
            hook = self._sae.cfg.metadata.hook_names.index(name)
            pre, _ = pre_acts(self._sae, rows, hook, of)
            ids = _ids(labels[i], one)
            named = [ids[j] for j in is_latent.nonzero()[:, 0].tolist()]
            links += _weights(leaf, sources, list(zip(named, pre, strict=True)))
            leaf, depth = x.detach().requires_grad_(), depth_of(name)
            sources = list(zip(ids, one.position.tolist(), one.vector, strict=True))
        last = self._walk.logits(self._run(leaf, depth, lm.shape.n_layers)[:, -1:])
        named = [(_logit_id(lm, t, self._ids), last[0, 0, t]) for t, _ in targets]
        return links + _weights(leaf, sources, named)

    def _run(self, x: Tensor, first: int, end: int) -> Tensor:
        for block in range(first, end):
            x = self._walk.run_block(x, block)
        return x

    def _tokens(self, leaf: Tensor) -> list[tuple[str, int, Tensor]]:
        return [
            (f"E_{token}_{at}", at, leaf[0, at].detach())
            for at, token in enumerate(self._ids)
        ]


def _weights(
    leaf: Float[Tensor, "1 pos d_in"],
    sources: Sequence[tuple[str, int, Tensor]],
    targets: Sequence[tuple[str, Tensor]],
) -> list[tuple[str, str, float]]:
    """The gradient of each target along each source, without those that are 0."""
    links: list[tuple[str, str, float]] = []
    for name, value in targets:
        (grad,) = torch.autograd.grad(value, leaf, retain_graph=True)
        along = [float(grad[0, at] @ vector.to(grad)) for _, at, vector in sources]
        links += [
            (source[0], name, weight)
            for source, weight in zip(sources, along, strict=True)
            if weight
        ]
    return links


def _ids(label: str, one: _Chosen) -> list[str]:
    pairs = zip(one.latent.tolist(), one.position.tolist(), strict=True)
    return [f"{label}_{latent}_{position}" for latent, position in pairs]


def _logit_id(lm: Any, token: int, ids: Sequence[int]) -> str:
    return f"{lm.shape.n_layers + 1}_{token}_{len(ids) - 1}"


def _nodes(
    lm: Any,
    task: Task,
    names: list[str],
    chosen: list[_Chosen],
    targets: list[tuple[int, float]],
) -> list[dict[str, Any]]:
    ids = task.clean[0].tolist()
    nodes = [
        _node(f"E_{token}_{at}", at, "E", at, "embedding", _text(lm, token))
        for at, token in enumerate(ids)
    ]
    effects = torch.cat([one.effect.abs() for one in chosen]).double()
    labels = short_labels(names)
    for label, one in zip(labels, chosen, strict=True):
        for i, name in enumerate(_ids(label, one)):
            latent, at = int(one.latent[i]), int(one.position[i])
            is_error = latent == ERROR
            kind = "mlp reconstruction error" if is_error else _LATENT
            text = (
                f'error at "{_text(lm, ids[at])}"' if is_error else f"latent {latent}"
            )
            node = _node(name, latent, label, at, kind, text)
            above = effects[effects >= abs(float(one.effect[i])) - 1e-12].sum()
            node["influence"] = float(above / effects.sum())
            node["activation"] = None if is_error else float(one.act[i])
            nodes.append(node)
    for rank, (token, prob) in enumerate(targets):
        text = f'Output "{_text(lm, token)}" (p={prob:.3f})'
        layer = str(lm.shape.n_layers + 1)
        name = _logit_id(lm, token, ids)
        node = _node(name, token, layer, len(ids) - 1, "logit", text)
        node |= {"token_prob": prob, "is_target_logit": rank == 0}
        nodes.append(node)
    return nodes


def _node(
    name: str, feature: int, layer: str, at: int, kind: str, text: str
) -> dict[str, Any]:
    return {
        "node_id": name,
        "feature": feature,
        "layer": layer,
        "ctx_idx": at,
        "feature_type": kind,
        "jsNodeId": name.rsplit("_", 1)[0] + f"-{0 if kind == _LATENT else at}",
        "clerp": text,
        "influence": None,
        "activation": None,
    }


def _metadata(lm: Any, task: Task, slug: str) -> dict[str, Any]:
    tokens = [_text(lm, token) for token in task.clean[0].tolist()]
    version = package_versions()[_PACKAGE]
    return {
        "slug": slug,
        "scan": Path(lm.name).name,
        "transcoder_list": [],
        "prompt": "".join(tokens),
        "prompt_tokens": tokens,
        "node_threshold": 1.0,
        "info": {
            "description": "Latents of a multi-layer SAE of the residual stream; a "
            "feature is the same latent at every layer.",
            "generator": {"name": _PACKAGE, "version": version},
        },
    }


def _text(lm: Any, token: int) -> str:
    return lm.tokenizer.decode([token])
