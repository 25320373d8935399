"""What the reader's own text does in the model: active latents, and continuations."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, Field
from sae_lens import SAE
from torch import Tensor

from sae_lens_multilayer.analysis.distributions import prompt_acts
from sae_lens_multilayer.evaluation.edits import LatentEdit
from sae_lens_multilayer.evaluation.encoder import LayerEncoder
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.models.model import Model, Replace
from sae_lens_multilayer.models.steps import steps, steps_obstacle
from sae_lens_multilayer.pictures.example_data import shorten
from sae_lens_multilayer.sae.views import hook_names_of
from sae_lens_multilayer.serving.jobs import Progress
from sae_lens_multilayer.text.prompts import Text

MAX_CHARS = 10_000
MAX_TOKENS = 256
"""Of a text with its continuation."""


class ActsRequest(BaseModel):
    """Which latents are active at each token of a text, at each layer?"""

    kind: Literal["activations"]
    text: str = Field(min_length=1, max_length=MAX_CHARS)


class PromptRequest(BaseModel):
    """The same for a prompt of the report, around one of its positions."""

    kind: Literal["prompt"]
    prompt: int = Field(ge=0)
    position: int = Field(ge=0)


class ContinueRequest(BaseModel):
    """How does the model continue a text, by itself and with an edit?"""

    kind: Literal["continue"]
    text: str = Field(min_length=1, max_length=MAX_CHARS)
    edit: Literal["add", "set", "reconstruct"]
    layers: list[int] = Field(min_length=1, max_length=1000)
    latent: int = 0
    value: float = Field(default=0.0, ge=-1e6, le=1e6, allow_inf_nan=False)
    n_new: int = Field(default=20, ge=1, le=64)


Request = ActsRequest | PromptRequest | ContinueRequest


@dataclass
class Explorer:
    """An SAE and its model, which process one text at a time."""

    sae: SAE[Any]
    model: Any
    text: Text
    """How the SAE's training text was tokenised."""
    text_of: Callable[[int], str]
    prompts: Int[Tensor, "prompt pos"]
    """Those of the report."""

    def __post_init__(self) -> None:
        self._model, self._encoder = as_model(self.model), LayerEncoder(self.sae)
        self._can_step = steps_obstacle(self._model) is None

    def check(self, request: Request) -> None:
        """Raise ValueError if a request does not fit the model or the SAE."""
        if isinstance(request, PromptRequest):
            n_prompts, n_pos = self.prompts.shape
            if request.prompt >= n_prompts or request.position >= n_pos:
                raise ValueError(
                    f"The prompt must be in [0, {n_prompts}) and the position in "
                    f"[0, {n_pos}); got {request.prompt} and {request.position}."
                )
            return
        n_new = request.n_new if isinstance(request, ContinueRequest) else 0
        n_tokens = self.token_ids(request.text).shape[1] + n_new
        most = min(MAX_TOKENS, self._model.shape.n_ctx or MAX_TOKENS)
        if n_tokens > most:
            raise ValueError(f"The text may have {most} tokens; it has {n_tokens}.")
        if not isinstance(request, ContinueRequest):
            return
        n_layers, d_sae = len(hook_names_of(self.sae)), self.sae.cfg.d_sae
        if not all(0 <= layer < n_layers for layer in request.layers):
            raise ValueError(f"Layers must be in [0, {n_layers}).")
        if not 0 <= request.latent < d_sae:
            raise ValueError(f"The latent must be in [0, {d_sae}).")

    def run(self, request: Request, progress: Progress) -> Any:
        """The answer to a request, as JSON values."""
        if isinstance(request, ActsRequest):
            return self.activations(self.token_ids(request.text))
        if isinstance(request, PromptRequest):
            ids = self.prompts[request.prompt : request.prompt + 1]
            return self.activations(ids, first_shown(request.position, ids.shape[1]))
        return self.continuations(request, progress)

    def token_ids(self, text: str) -> Int[Tensor, "1 pos"]:
        """The tokens of a text, after the first one of training prompts if any."""
        tokenizer = self._model.tokenizer
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        first = tokenizer.bos_token_id
        if self.text.prepend_bos and first is not None:
            ids = [first, *ids]
        if not ids:
            raise ValueError("The text has no tokens.")
        return torch.tensor([ids])

    def activations(self, ids: Int[Tensor, "1 pos"], first: int = 0) -> dict[str, Any]:
        """Texts of up to `MAX_TOKENS` tokens from `first`, and columns of activations.

        Positions are counted from `first`.
        """
        acts = prompt_acts(self.sae, self.model, ids)
        positions = acts.positions - first
        shown = (positions >= 0) & (positions < MAX_TOKENS)
        return {
            "first": first,
            "tokens": self._texts(acts.token_ids[first : first + MAX_TOKENS]),
            "positions": positions[shown].tolist(),
            "layers": acts.layers[shown].tolist(),
            "latents": acts.latents[shown].tolist(),
            "acts": shorten(acts.acts[shown].numpy()),
        }

    @torch.no_grad()
    def continuations(
        self, request: ContinueRequest, progress: Progress
    ) -> dict[str, Any]:
        """Greedy continuations of the clean and the edited model, and two numbers.

        `ce_loss` is the mean over the predicted tokens of the text, NaN (None) if there
        are none; `kl_div` that of edited from clean predictions after its last token;
        both in nats.
        """
        ids = self.token_ids(request.text)
        names = self._encoder.hook_names
        # The first position is the attention sink of most models.
        edit = LatentEdit(
            request.edit,
            [names[layer] for layer in request.layers],
            [request.latent],
            request.value,
            slice(1, None),
        )
        n_new, n_text = request.n_new, ids.shape[1]
        clean_logits, clean = self._continued(
            ids, None, n_new, lambda done: progress(done, 2 * n_new)
        )
        logits, edited = self._continued(
            ids, edit, n_new, lambda done: progress(n_new + done, 2 * n_new)
        )
        p, q = (some[-1].log_softmax(-1) for some in (clean_logits, logits))
        return {
            "tokens": self._texts(ids[0]),
            "clean": self._texts(clean[n_text:]),
            "edited": self._texts(edited[n_text:]),
            "ce_loss_clean": _ce_loss(clean_logits, ids[0]),
            "ce_loss_edited": _ce_loss(logits, ids[0]),
            "kl_div": _finite(float((p.exp() * (p - q)).sum())),
        }

    def _continued(
        self,
        ids: Int[Tensor, "1 pos"],
        edit: LatentEdit | None,
        n_new: int,
        progress: Callable[[int], None],
    ) -> tuple[Float[Tensor, "pos d_vocab"], Int[Tensor, " longer"]]:
        """See `continue_text`; with cached keys and values where the model can."""
        in_text = self._replacements(edit)
        if not self._can_step or self._model.mask(ids) is not None:
            return continue_text(self._model, ids, in_text, n_new, progress)
        # A vector is replaced without regard to others, so the keys and values of the
        # positions before stay as they are.
        every = edit and replace(edit, positions=None)
        return continue_in_steps(
            self._model, ids, in_text, self._replacements(every), n_new, progress
        )

    def _replacements(self, edit: LatentEdit | None) -> dict[str, Replace]:
        found = {} if edit is None else edit.replacements(self._encoder)
        return {self._encoder.hook_names[hook]: some for hook, some in found.items()}

    def _texts(self, ids: Int[Tensor, " pos"]) -> list[str]:
        return [self.text_of(i) for i in ids.tolist()]


def continue_text(
    model: Model,
    ids: Int[Tensor, "1 pos"],
    replacements: Mapping[str, Replace],
    n_new: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Float[Tensor, "pos d_vocab"], Int[Tensor, " longer"]]:
    """Continue a text greedily, up to an end-of-text token, with activations replaced.

    A whole pass for each new token: the plain version of `continue_in_steps`.

    Returns:
        The logits of the text itself, and the text with its continuation.
    """

    def logits(ids: Tensor) -> Tensor:
        if replacements:
            return model.logits_with_hooks(ids, replacements)
        return model.logits(ids)

    return _greedy(model, ids, logits, n_new, progress)


def continue_in_steps(
    model: Model,
    ids: Int[Tensor, "1 pos"],
    replacements: Mapping[str, Replace],
    new_replacements: Mapping[str, Replace],
    n_new: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Float[Tensor, "pos d_vocab"], Int[Tensor, " longer"]]:
    """`continue_text` from cached keys and values.

    The same up to rounding, which can decide between tokens of nearly the same logit.

    Args:
        replacements: Of vectors of the text.
        new_replacements: Of the vector of a new token.
    """
    n_text = ids.shape[1]
    with steps(model) as step:

        def logits(ids: Tensor) -> Tensor:
            if ids.shape[1] == n_text:
                return step(ids, replacements)
            return step(ids[:, -1:], new_replacements)

        return _greedy(model, ids, logits, n_new, progress)


@torch.no_grad()
def _greedy(
    model: Model,
    ids: Int[Tensor, "1 pos"],
    logits_of: Callable[[Tensor], Tensor],
    n_new: int,
    progress: Callable[[int], None],
) -> tuple[Float[Tensor, "pos d_vocab"], Int[Tensor, " longer"]]:
    end = getattr(model.tokenizer, "eos_token_id", None)
    of_text: Tensor | None = None
    for done in range(n_new):
        progress(done)
        logits = logits_of(ids)[0].float()
        of_text = logits if of_text is None else of_text
        token = int(logits[-1].argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token == end:
            break
    assert of_text is not None  # `n_new` is at least 1
    return of_text.cpu(), ids[0]


def first_shown(position: int, n_pos: int) -> int:
    """The first of `MAX_TOKENS` positions of a prompt, a quarter after `position`.

    Example:
        >>> [first_shown(p, 1000) for p in (5, 500, 999)]
        [0, 308, 744]
    """
    return max(0, min(position - 3 * MAX_TOKENS // 4, n_pos - MAX_TOKENS))


def _ce_loss(
    logits: Float[Tensor, "pos d_vocab"], ids: Int[Tensor, " pos"]
) -> float | None:
    if len(ids) < 2:
        return None
    log_probs = logits[:-1].log_softmax(-1)
    return _finite(-float(log_probs.gather(1, ids[1:, None]).mean()))


def _finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
