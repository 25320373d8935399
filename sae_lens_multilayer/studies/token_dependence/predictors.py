"""What is known of a token besides its activations, to compare layers with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.analysis.batch import TokenBatch
from sae_lens_multilayer.hooks import is_residual
from sae_lens_multilayer.lens.carrier import lens_of
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.sae.views import hook_names_of

_ROWS = 256
"""Vectors that are unembedded at a time."""
_WORD_STARTS = ("Ġ", "▁", " ")
"""First characters of a token that begins a word, in different tokenizers."""

NO_TOKEN = -1
"""Previous token id of the first position."""


@dataclass
class TokenPredictors:
    """Values of each token; NaN where one is not defined."""

    prompt: Int[Tensor, " token"]
    """Index of the token's prompt."""
    position: Int[Tensor, " token"]
    token_id: Int[Tensor, " token"]
    previous_id: Int[Tensor, " token"]
    values: dict[str, Float[Tensor, " token"]]
    """`position`: log(1 + position). `frequency`: log of the number of tokens with this
    id. `word_initial`: 1 if the token begins with a space. `surprisal`: of the token,
    `entropy`: of the next token, both in nats. `settle_layer`: first layer from which
    the most likely next token, read by the SAE's lens or else the logit lens, stays.
    `std_growth`: log of the vector's standard deviation at the last layer over that at
    the first."""


class TokenPredictorSums:
    """Collects `TokenPredictors`; memory grows with the number of tokens.

    Surprisal and entropy take another forward pass of the model, and are those of the
    trained model in every null.
    """

    def __init__(self, sae: SAE[Any], model: Any) -> None:
        self._model, lens = as_model(model), lens_of(sae)
        # The unembedding cannot read whitened vectors.
        is_read = lens is not None and lens.config.maps_to_last_layer
        self._lens = lens if is_read else None
        self._tokenizer = self._model.tokenizer
        self._unembed: Callable[[Tensor], Tensor] | None = None
        if all(map(is_residual, hook_names_of(sae))):
            self._unembed = self._model.unembed()
        self._batches: list[dict[str, Tensor]] = []

    def update(self, batch: TokenBatch) -> None:
        where = batch.prompt, batch.position
        previous = batch.prompts.roll(1, 1)
        previous[:, 0] = NO_TOKEN
        surprisal, entropy = self._from_logits(batch.prompts)
        std = batch.x.std(-1).double().cpu()
        values = {
            "prompt": batch.prompt + batch.first_prompt,
            "position": batch.position,
            "token_id": batch.token_ids,
            "previous_id": previous[where],
            "surprisal": surprisal[where],
            "entropy": entropy[where],
            "std_growth": (std[:, -1] / std[:, 0]).log(),
        }
        if self._unembed is not None:
            z = batch.x if self._lens is None else self._lens.transform(batch.x)
            values["settle_layer"] = settle_layer(self._unembed, z)
        self._batches.append(values)

    def _from_logits(
        self, prompts: Int[Tensor, "prompt pos"]
    ) -> tuple[Float[Tensor, "prompt pos"], Float[Tensor, "prompt pos"]]:
        """Surprisal of each token (NaN at the first), and entropy of the next one."""
        surprisal = torch.full(prompts.shape, torch.nan, dtype=torch.float64)
        entropy = torch.empty_like(surprisal)
        for i, logits in enumerate(self._model.logits(prompts)):
            log_probs = logits.float().log_softmax(-1)
            entropy[i] = -(log_probs.exp() * log_probs).sum(-1).double().cpu()
            next_ids = prompts[i, 1:, None].to(log_probs.device)
            surprisal[i, 1:] = -log_probs[:-1].gather(1, next_ids)[:, 0].double().cpu()
        return surprisal, entropy

    def compute(self) -> TokenPredictors:
        names = self._batches[0]
        found = {n: torch.cat([batch[n] for batch in self._batches]) for n in names}
        position, token_id = found.pop("position"), found.pop("token_id")
        prompt, previous_id = found.pop("prompt"), found.pop("previous_id")
        values = {
            "position": position.double().log1p(),
            "frequency": token_id.bincount()[token_id].double().log(),
        }
        if self._tokenizer is not None:
            values["word_initial"] = self._word_initial(token_id)
        return TokenPredictors(prompt, position, token_id, previous_id, values | found)

    def _word_initial(self, token_id: Int[Tensor, " token"]) -> Tensor:
        used, index = token_id.unique(return_inverse=True)
        texts = self._tokenizer.convert_ids_to_tokens(used.tolist())
        starts = [text.startswith(_WORD_STARTS) for text in texts]
        return torch.tensor(starts, dtype=torch.float64)[index]


@torch.no_grad()
def settle_layer(
    unembed: Callable[[Tensor], Tensor], z: Float[Tensor, "token layer d_model"]
) -> Float[Tensor, " token"]:
    """First layer (index) from which the largest logit stays the same token's.

    Layers are read from the last one down, only for tokens that have not changed yet.
    """

    def best(vectors: Tensor) -> Tensor:
        return torch.cat([unembed(rows).argmax(-1) for rows in vectors.split(_ROWS)])

    n_tokens, n_layers = z.shape[:2]
    settled = torch.full((n_tokens,), n_layers - 1, dtype=torch.float64)
    final, left = best(z[:, -1]), torch.arange(n_tokens, device=z.device)
    for layer in reversed(range(n_layers - 1)):
        left = left[best(z[left, layer]) == final[left]]
        if not len(left):
            break
        settled[left.cpu()] = layer
    return settled
