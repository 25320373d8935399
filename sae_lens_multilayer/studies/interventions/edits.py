"""Edits of some latents of one prompt, with controls and predictions."""

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
    PromptRuns,
    direct_predictions,
)
from sae_lens_multilayer.studies.interventions.runners import Additions
from sae_lens_multilayer.text.prompts import Prompts
from sae_lens_multilayer.topk.tile import make_tile


class TokenEdits:
    """Edits latents where they are active, all edits of a prompt together."""

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
        position: Int[Tensor, " pair"],
        latents: Int[Tensor, " pair"],
        acts: Float[Tensor, "pair layer"],
    ) -> dict[str, Tensor]:
        """The rows of all edits of one prompt, each of a latent at a position.

        Positions after an edit are left out, as they change nothing before them.

        Args:
            index: Of the prompt.
            position: In order.
            acts: The activations to edit; above 0 at one layer or more.
        """
        names, upto = self._encoder.hook_names, int(position.max()) + 1
        runs = PromptRuns(
            self._model,
            self._splicer,
            names,
            prompt.ids[:, :upto],
            self._max_edits,
            position.unique(),
            self._unembed,
        )
        x = runs.x.transpose(0, 1).to(self._sae.device, self._sae.dtype)
        clean = Clean(x, self._sae.encode_topk(x), prompt.counted[0, :upto])
        row, layer = acts.nonzero(as_tuple=True)
        latent, at, act = latents[row], position[row], acts[row, layer].to(x)
        length = (self._alpha - 1) * act * clean.acts.std[at, layer, 0]
        dx = length.unsqueeze(1) * latent_vectors(self._encoder, layer, latent)
        edits = Additions(layer, at, dx.to(runs.x))
        controls = self._controls(edits, latent, clean, index)
        columns = {
            "latent": latent,
            "layer": layer,
            "prompt": torch.full_like(layer, index),
            "position": at,
            "act": act,
            "norm": dx.norm(dim=1),
            "predictions": self._predictions(runs, edits),
            **self._effects(runs, edits, latent, controls),
        }
        return {name: v.detach().cpu().contiguous() for name, v in columns.items()}

    def _controls(
        self, edits: Additions, latent: Int[Tensor, " edit"], clean: Clean, index: int
    ) -> list[tuple[Additions, Bool[Tensor, " edit"]]]:
        """Controls of the edits of each token, drawn with a seed of its own."""
        sign = 1.0 if self._alpha > 1 else -1.0
        of_tokens: list[list[tuple[Additions, Bool[Tensor, " edit"]]]] = []
        for position in edits.position.unique().tolist():
            rows = edits.position == position
            seed = np.random.SeedSequence([self._seed, index, position])
            generator = torch.Generator().manual_seed(int(seed.generate_state(1)[0]))
            part = Additions(*(v[rows] for v in edits))
            some = latent[rows], clean.upto(position + 1), sign, generator
            of_tokens.append(make_controls(self._encoder, part, *some))
        return [
            (Additions.joined([a for a, _ in kind]), torch.cat([e for _, e in kind]))
            for kind in zip(*of_tokens, strict=True)
        ]

    def _effects(
        self,
        runs: PromptRuns,
        edits: Additions,
        latent: Int[Tensor, " edit"],
        controls: list[tuple[Additions, Bool[Tensor, " edit"]]],
    ) -> dict[str, Tensor]:
        """Effects of the edits and of their controls, run together."""
        n, kinds = len(latent), 1 + len(controls)
        exists = [torch.ones(n, dtype=torch.bool), *(found for _, found in controls)]
        all_edits = Additions.joined([edits, *(added for added, _ in controls)])
        found = runs.effects(all_edits, self._n_top)
        missing = ~torch.stack(exists, 1).to(found.kl.device)
        both = found.kl, found.target
        kl, target = (v.view(kinds, n).T.masked_fill(missing, torch.nan) for v in both)
        return {
            "kl": kl,
            "target": target,
            "effect_norm": found.norm[:n],
            "top_ids": found.top_ids[:n],
            "top_values": found.top_values[:n],
            **self._later(runs, edits, latent, found.later[:n]),
        }

    def _predictions(
        self, runs: PromptRuns, edits: Additions
    ) -> Float[Tensor, "edit 3"]:
        last, targets = runs.last[edits.position], runs.targets[edits.position]
        direct = direct_predictions(self._unembed, last, edits.dx.to(last), targets)
        gradients = runs.gradient_predictions(edits, self._n_steps)
        return torch.cat([direct.unsqueeze(1), gradients.to(direct)], 1)

    def _later(
        self,
        runs: PromptRuns,
        edits: Additions,
        latent: Int[Tensor, " edit"],
        later: Float[Tensor, "edit layer d_in"],
    ) -> dict[str, Float[Tensor, "edit layer"]]:
        """What the edits change at later layers: the latent, and the error term."""
        names = "self_effect", "pass_through", "change", "error_change"
        shape = len(latent), len(runs.x)
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
        both = torch.cat([clean, edited]).to(sae.W_dec)
        error = both - self._encoder.reconstruct(hook, both)[1].to(both)
        halves = (v.split(len(clean)) for v in (both, error))
        squares = ((after - before).square().sum(1) for before, after in halves)
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
