"""Edits each latent where it is active, and measures what follows, with controls."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_multilayer.evaluation.encoder import LayerEncoder, is_multi_layer
from sae_lens_multilayer.evaluation.splicing import make_splicer
from sae_lens_multilayer.hooks import block_end
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.studies.interventions.controls import (
    Clean,
    latent_vectors,
    make_controls,
)
from sae_lens_multilayer.studies.interventions.effects import (
    Additions,
    Effects,
    PromptRuns,
    direct_predictions,
)
from sae_lens_multilayer.studies.interventions.result import Interventions
from sae_lens_multilayer.studies.interventions.sample import take_sample
from sae_lens_multilayer.text.prompts import Prompts, Tokens, take_prompts
from sae_lens_multilayer.topk.sparse import TopKActs
from sae_lens_multilayer.topk.tile import make_tile


def interventions(
    sae: SAE[Any],
    model: Any,
    tokens: Tokens,
    *,
    alpha: float = 0.0,
    latents: Sequence[int] | None = None,
    n_latents: int = 200,
    n_tokens: int = 8,
    n_steps: int = 8,
    n_top: int = 100,
    max_edits: int = 64,
    seed: int = 0,
    n_prompts: int | None = None,
    batch_size_prompts: int = 8,
    exclude_positions: Sequence[int] = (),
) -> Interventions:
    """Scale latents where they are active, one layer and token at a time.

    Each edit takes `6 + n_steps` runs from the middle of its prompt, five of them for
    the edit and its controls, the others with gradients for the predictions.

    Args:
        sae: A multi-layer SAE on the residual stream.
        alpha: Factor of the activation: 0 ablates, 2 doubles.
        latents: The latents to edit; None: `n_latents`, stratified by mean layer and
            number of layers.
        n_tokens: Most tokens for each latent, at random. All layers at which it is
            active there are edited.
        n_steps: Steps of integrated gradients.
        n_top: Logits of each effect to keep.
        max_edits: Most prompts in one call of a block.
        seed: Of latents, tokens and controls.
        n_prompts, batch_size_prompts, exclude_positions: See `PassOptions`.

    Raises:
        ValueError: If `alpha` is not finite or 1, a hook is not at the residual stream,
            or a latent in `latents` is never active.
    """
    _check(sae, alpha)
    lm, encoder = as_model(model), LayerEncoder(sae)
    prompts = take_prompts(
        lm, tokens, n_prompts, batch_size_prompts, None, exclude_positions
    )
    sizes = n_latents, n_tokens, seed
    sample = take_sample(
        sae, model, prompts, latents, *sizes, batch_size_prompts=batch_size_prompts
    )
    splicer = make_splicer(lm, encoder.hook_names, max_edits, None)
    edits = _Edits(sae, lm, alpha, n_steps, n_top, seed)
    for prompt in tqdm(sample.pairs[:, 1].unique().tolist(), desc="Editing"):
        one = prompts[prompt : prompt + 1]
        runs = PromptRuns(lm, splicer, encoder.hook_names, one.ids, max_edits)
        edits.add(runs, one, sample.pairs[sample.pairs[:, 1] == prompt])
    counts = sample.active_layers.n_active_tokens
    return Interventions(
        hook_names=encoder.hook_names,
        alpha=alpha,
        seed=seed,
        latents=sample.latents,
        probs=sample.distributions.probs[:, sample.latents],
        hit_rate=(counts / sample.distributions.n_tokens)[sample.latents],
        **edits.columns(),
    )


def _acts_of_pairs(
    acts: TopKActs, pairs: Int[Tensor, "pair 3"]
) -> Float[Tensor, "pair layer"]:
    """Activations of the latent of each pair at its position; 0 if it is silent."""
    indices, values = acts.indices[pairs[:, 2]], acts.values[pairs[:, 2]]
    return (values * (indices == pairs[:, 0].view(-1, 1, 1).to(indices))).sum(-1)


def _check(sae: SAE[Any], alpha: float) -> None:
    if not abs(alpha) < float("inf") or alpha == 1:
        raise ValueError(
            f"`alpha` must be finite and not 1, which changes nothing; got {alpha}."
        )
    if not is_multi_layer(sae):
        raise ValueError(
            f"Interventions need a multi-layer SAE; got a {type(sae).__name__}."
        )
    inside = [name for name in hook_names_of(sae) if block_end(name) is None]
    if inside:
        raise ValueError(
            "Interventions need hooks at the residual stream, the input or output of a "
            f"block, as predictions follow it; got {inside[:3]}."
        )


class _Edits:
    """Edits and controls, prompt by prompt."""

    def __init__(
        self, sae: Any, model: Any, alpha: float, n_steps: int, n_top: int, seed: int
    ) -> None:
        self._sae, self._encoder, self._alpha = sae, LayerEncoder(sae), alpha
        self._n_steps, self._n_top = n_steps, n_top
        self._unembed = model.unembed()
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def add(
        self, runs: PromptRuns, prompt: Prompts, pairs: Int[Tensor, "pair 3"]
    ) -> None:
        """Edit the latents of some pairs of latent, prompt and position."""
        x = runs.x.transpose(0, 1).to(self._sae.device, self._sae.dtype)
        acts = self._sae.encode_topk(x)
        own = _acts_of_pairs(acts, pairs)
        pair, layer = (axis.cpu() for axis in own.nonzero(as_tuple=True))
        latent, position = pairs[pair, 0], pairs[pair, 2]
        length = (self._alpha - 1) * own[pair, layer] * acts.std[position, layer, 0]
        if not len(layer):
            return
        dx = length.unsqueeze(1) * latent_vectors(self._encoder, layer, latent)
        edits = Additions(layer, position, dx.to(runs.x))
        effects = runs.effects(edits)
        controls = make_controls(
            self._encoder,
            edits,
            latent,
            Clean(x, acts, prompt.counted[0]),
            1.0 if self._alpha > 1 else -1.0,
            self._generator,
        )
        top = effects.logits.abs().topk(min(self._n_top, effects.logits.shape[1]))
        kl, target = self._effects_of_controls(runs, controls)
        later, predicted = self._self_effect(runs, edits, latent, effects)
        columns = {
            "latent": latent,
            "layer": layer,
            "prompt": pairs[pair, 1],
            "position": position,
            "act": own[pair, layer],
            "norm": dx.norm(dim=1),
            "kl": torch.cat([effects.kl.unsqueeze(1), kl], 1),
            "target": torch.cat([effects.target.unsqueeze(1), target], 1),
            "predictions": self._predictions(runs, edits),
            "self_effect": later,
            "pass_through": predicted,
            "effect_norm": effects.logits.norm(dim=1),
            "top_ids": top.indices,
            "top_values": effects.logits.gather(1, top.indices),
        }
        self._parts.append({name: v.detach().cpu() for name, v in columns.items()})

    def columns(self) -> dict[str, Any]:
        """The columns of all edits."""
        names = self._parts[0]
        return {n: torch.cat([part[n] for part in self._parts]) for n in names}

    def _predictions(
        self, runs: PromptRuns, edits: Additions
    ) -> Float[Tensor, "edit 3"]:
        last, targets = runs.last[edits.position], runs.targets[edits.position]
        direct = direct_predictions(self._unembed, last, edits.dx.to(last), targets)
        steps = [(i + 0.5) / self._n_steps for i in range(self._n_steps)]
        gradient = runs.gradient_predictions(edits, [0.0])
        integrated = runs.gradient_predictions(edits, steps)
        return torch.stack([direct, gradient.to(direct), integrated.to(direct)], 1)

    def _self_effect(
        self,
        runs: PromptRuns,
        edits: Additions,
        latent: Int[Tensor, " edit"],
        effects: Effects,
    ) -> tuple[Float[Tensor, "edit layer"], Float[Tensor, "edit layer"]]:
        """Change of the latent's pre-activation at later layers, and its prediction."""
        sae, n_layers = self._sae, len(runs.x)
        found = sae.W_dec.new_full((2, len(edits), n_layers), torch.nan)
        for hook in range(1, n_layers):
            rows = edits.layer < hook
            if not rows.any():
                continue
            of, dx = latent[rows], edits.dx[rows].to(sae.W_dec)
            before = pre_acts(sae, runs.x[hook, edits.position[rows]], hook, of)
            after = pre_acts(sae, effects.later[rows, hook], hook, of)
            lens = lens_of(sae)
            dz = dx if lens is None else lens.transform_difference(dx, hook)
            found[0, rows, hook] = after[0] - before[0]
            found[1, rows, hook] = (dz * sae.W_enc.T[of]).sum(1) / before[1]
        return found[0], found[1]

    def _effects_of_controls(
        self,
        runs: PromptRuns,
        controls: Sequence[tuple[Additions, Bool[Tensor, " edit"]]],
    ) -> tuple[Float[Tensor, "edit control"], Float[Tensor, "edit control"]]:
        found: list[tuple[Tensor, Tensor]] = []
        for additions, exists in controls:
            effects = runs.effects(additions)
            missing = ~exists.to(effects.kl.device)
            nan = torch.nan
            kl = effects.kl.masked_fill(missing, nan)
            found.append((kl, effects.target.masked_fill(missing, nan)))
        kl, target = (torch.stack(columns, 1) for columns in zip(*found, strict=True))
        return kl, target


def pre_acts(
    sae: Any,
    x: Float[Tensor, "row d_in"],
    hook: int,
    latents: Int[Tensor, " row"],
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """The pre-activation of one latent for each vector, and the vector's std."""
    z = sae.into_lens(x.to(sae.W_enc), hook)
    tile = make_tile(z, sae.b_dec, sae.standardizes)
    return (tile.v * sae.W_enc.T[latents]).sum(1), tile.std[:, 0]
