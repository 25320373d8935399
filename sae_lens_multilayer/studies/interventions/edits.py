"""Edits of some latents at one token, with controls and predictions."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_multilayer.evaluation.encoder import LayerEncoder
from sae_lens_multilayer.evaluation.splicing import make_splicer
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.models.model import Model
from sae_lens_multilayer.studies.interventions.controls import (
    Clean,
    latent_vectors,
    make_controls,
)
from sae_lens_multilayer.studies.interventions.effects import (
    Additions,
    PromptRuns,
    direct_predictions,
)
from sae_lens_multilayer.text.prompts import Prompts
from sae_lens_multilayer.topk.tile import make_tile


class TokenEdits:
    """Edits the latents of tokens, all layers and controls of a token together."""

    def __init__(
        self,
        sae: Any,
        model: Model,
        *,
        alpha: float,
        n_steps: int,
        n_top: int,
        max_edits: int,
        seed: int,
    ) -> None:
        """See `interventions`."""
        self._sae, self._encoder, self._model = sae, LayerEncoder(sae), model
        self._alpha, self._n_steps, self._n_top = alpha, n_steps, n_top
        self._max_edits, self._seed = max_edits, seed
        names = self._encoder.hook_names
        self._splicer = make_splicer(model, names, max_edits, None)
        self._unembed = model.unembed()

    @torch.no_grad()
    def columns(
        self,
        prompt: Prompts,
        index: int,
        position: int,
        latents: Int[Tensor, " latent"],
        acts: Float[Tensor, "latent layer"],
    ) -> dict[str, Tensor]:
        """The rows of all edits of some latents at one position of a prompt.

        Later positions are left out, as they change nothing before them.

        Args:
            index: Of the prompt.
            acts: The activations to edit; above 0 at one layer or more.
        """
        upto = slice(position + 1)
        ids, counted = prompt.ids[:, upto], prompt.counted[0, upto]
        names = self._encoder.hook_names
        runs = PromptRuns(self._model, self._splicer, names, ids, self._max_edits)
        x = runs.x.transpose(0, 1).to(self._sae.device, self._sae.dtype)
        clean = Clean(x, self._sae.encode_topk(x), counted)
        row, layer = acts.nonzero(as_tuple=True)
        latent, at = latents[row], torch.full_like(layer, position)
        length = (self._alpha - 1) * acts[row, layer].to(x)
        length *= clean.acts.std[at, layer, 0]
        dx = length.unsqueeze(1) * latent_vectors(self._encoder, layer, latent)
        edits = Additions(layer, at, dx.to(runs.x))
        own_seed = np.random.SeedSequence([self._seed, index, position])
        generator = torch.Generator().manual_seed(int(own_seed.generate_state(1)[0]))
        sign = 1.0 if self._alpha > 1 else -1.0
        controls = make_controls(self._encoder, edits, latent, clean, sign, generator)
        columns = {
            "latent": latent,
            "layer": layer,
            "prompt": torch.full_like(layer, index),
            "position": at,
            "act": acts[row, layer].to(x),
            "norm": dx.norm(dim=1),
            "predictions": self._predictions(runs, edits),
            **self._effects(runs, edits, latent, controls),
        }
        return {name: v.detach().cpu().contiguous() for name, v in columns.items()}

    def _effects(
        self,
        runs: PromptRuns,
        edits: Additions,
        latent: Int[Tensor, " edit"],
        controls: list[tuple[Additions, Bool[Tensor, " edit"]]],
    ) -> dict[str, Tensor]:
        """Effects of the edits and of their controls, run together."""
        n, kinds = len(edits), 1 + len(controls)
        exists = [torch.ones(n, dtype=torch.bool), *(found for _, found in controls)]
        all_edits = Additions.joined([edits, *(added for added, _ in controls)])
        found = runs.effects(all_edits)
        missing = ~torch.stack(exists, 1).to(found.kl.device)
        both = found.kl, found.target
        kl, target = (v.view(kinds, n).T.masked_fill(missing, torch.nan) for v in both)
        logits = found.logits[:n]
        top = logits.abs().topk(min(self._n_top, logits.shape[1]))
        return {
            "kl": kl,
            "target": target,
            "effect_norm": logits.norm(dim=1),
            "top_ids": top.indices,
            "top_values": logits.gather(1, top.indices),
            **self._later(runs, edits, latent, found.later[:n]),
        }

    def _predictions(
        self, runs: PromptRuns, edits: Additions
    ) -> Float[Tensor, "edit 3"]:
        last, targets = runs.last[edits.position], runs.targets[edits.position]
        direct = direct_predictions(self._unembed, last, edits.dx.to(last), targets)
        gradient = runs.gradient_predictions(edits)
        integrated = runs.integrated_predictions(edits, self._n_steps)
        return torch.stack([direct, gradient.to(direct), integrated.to(direct)], 1)

    def _later(
        self,
        runs: PromptRuns,
        edits: Additions,
        latent: Int[Tensor, " edit"],
        later: Float[Tensor, "edit layer d_in"],
    ) -> dict[str, Float[Tensor, "edit layer"]]:
        """What the edits change at later layers: the latent, and the error term."""
        names = "self_effect", "pass_through", "change", "error_change"
        shape = len(edits), len(runs.x)
        found = {n: self._sae.W_dec.new_full(shape, torch.nan) for n in names}
        for hook in range(1, len(runs.x)):
            rows = edits.layer < hook
            if not rows.any():
                continue
            of, dx = latent[rows], edits.dx[rows].to(self._sae.W_dec)
            clean = runs.x[hook, edits.position[rows]]
            values = self._at_layer(hook, clean, later[rows, hook], of, dx)
            for name, column in zip(names, values, strict=True):
                found[name][rows, hook] = column
        return found

    def _at_layer(
        self,
        hook: int,
        clean: Float[Tensor, "row d_in"],
        edited: Float[Tensor, "row d_in"],
        latent: Int[Tensor, " row"],
        dx: Float[Tensor, "row d_in"],
    ) -> tuple[Float[Tensor, " row"], ...]:
        sae, lens = self._sae, lens_of(self._sae)
        before, after = (pre_acts(sae, x, hook, latent) for x in (clean, edited))
        dz = dx if lens is None else lens.transform_difference(dx, hook)
        passed = (dz * sae.W_enc.T[latent]).sum(1) / before[1]
        both = torch.cat([clean[:1], edited]).to(sae.W_dec)
        error = both - self._encoder.reconstruct(hook, both)[1].to(both)
        squares = ((v[1:] - v[:1]).square().sum(1) for v in (both, error))
        return after[0] - before[0], passed, *squares


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
