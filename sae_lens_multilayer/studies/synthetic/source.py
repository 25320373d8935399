"""A synthetic stream as a source for training and as a model for the analyses."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from sae_lens_multilayer.hooks import unknown_name
from sae_lens_multilayer.models.model import Model, ModelShape
from sae_lens_multilayer.models.unembed import ModelUnembed
from sae_lens_multilayer.record import hash_of_json, hash_of_tensors
from sae_lens_multilayer.store.source import Chunk, IndexedSource
from sae_lens_multilayer.studies.synthetic.streams import (
    SyntheticStream,
    SyntheticTokens,
)


class SyntheticModel(Model):
    """A synthetic stream as a model, for `analyze`, `reconstruction_metrics`, ....

    Its prompts are whole prompts of the stream, as `prompts` returns them: the token
    ids of prompt i are `i * context_size` and the following ones. It has no logits.
    """

    module: SyntheticStream

    def __init__(self, stream: SyntheticStream) -> None:
        cfg = stream.cfg
        super().__init__(
            stream, ModelShape(cfg.n_layers, cfg.d_in, n_ctx=cfg.context_size)
        )

    @property
    @override
    def name(self) -> str:
        return "a synthetic stream"

    def prompts(self, first: int, n_prompts: int) -> Int[Tensor, "prompt pos"]:
        """Token ids of prompts `first`, `first + 1`, ...."""
        size = self.module.cfg.context_size
        return torch.arange(first * size, (first + n_prompts) * size).view(-1, size)

    def tokens(
        self, prompts: Int[Tensor, "prompt pos"]
    ) -> Generator[SyntheticTokens, None, None]:
        """What each of some prompts contains."""
        size = self.module.cfg.context_size
        firsts = prompts[:, 0] // size
        if not torch.equal(prompts, firsts[:, None] * size + torch.arange(size)):
            raise ValueError(
                f"Prompts of a synthetic stream must be whole, {size} tokens each; use "
                "`SyntheticModel.prompts`."
            )
        for index in firsts.tolist():
            yield self.module.prompt(index)

    @override
    def own_hook_names(self, hook_names: Sequence[str]) -> list[str]:
        known = self.module.cfg.hook_names
        for name in hook_names:
            if name not in known:
                raise unknown_name("The stream has no hook", name, known)
        return list(hook_names)

    @override
    def vectors(
        self,
        tokens: Int[Tensor, "prompt pos"],
        hook_names: Sequence[str],
        head_indices: Sequence[int | None] | None = None,
        **model_kwargs: Any,
    ) -> list[Float[Tensor, "prompt pos d_vector"]]:
        x = torch.stack([part.x for part in self.tokens(tokens.cpu())])
        known = self.module.cfg.hook_names
        return [x[:, :, known.index(n)] for n in self.own_hook_names(hook_names)]

    @override
    def residual_streams(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        raise _no_logits()

    @override
    def logits(self, tokens: Tensor) -> Tensor:
        raise _no_logits()

    @override
    def logits_with_hooks(self, tokens: Tensor, replacements: Any) -> Tensor:
        raise _no_logits()

    @property
    @override
    def token_embeddings(self) -> Tensor:
        raise _no_logits()

    @override
    def _unembedding(self) -> tuple[Tensor, Tensor | None]:
        raise _no_logits()

    @override
    def unembed(self) -> ModelUnembed:
        raise _no_logits()


def _no_logits() -> ValueError:
    return ValueError(
        "A synthetic stream has vectors only, no embedding and no logits: use "
        "`reconstruction_metrics` instead of `evaluate`."
    )


class SyntheticSource(IndexedSource):
    """The first prompts of a synthetic stream, to train on; a chunk is one prompt."""

    def __init__(
        self,
        stream: SyntheticStream,
        n_prompts: int,
        hook_names: Sequence[str] | None = None,
        vectors: Float[Tensor, "token layer d_in"] | None = None,
    ) -> None:
        """Prepare to read some layers.

        Args:
            n_prompts: Prompts in an epoch.
            hook_names: Layers of the stream, in any order; None: all.
            vectors: All vectors of these prompts, instead of generating them.
        """
        cfg = stream.cfg
        self.hook_names = list(hook_names or cfg.hook_names)
        self._layers = [cfg.hook_names.index(name) for name in self.hook_names]
        self.d_in, self.dtype = cfg.d_in, torch.float32
        self.max_tokens_per_chunk = cfg.context_size
        self.excluded_token_ids = []
        self._stream, self.chunks_per_epoch, self._vectors = stream, n_prompts, vectors
        drawn = hash_of_tensors(dict(stream.named_parameters()))
        settings = hash_of_json([drawn, vars(cfg), n_prompts, self.hook_names])
        self.fingerprint = 1 + int(settings[:15], 16)

    @override
    def n_tokens(self, chunk: Chunk) -> int:
        return self.max_tokens_per_chunk

    @override
    def vectors(
        self, chunk: Chunk, rows: Int[Tensor, " token"] | None = None
    ) -> Generator[Float[Tensor, "token d_in"]]:
        index, size = int(chunk), self.max_tokens_per_chunk
        if self._vectors is None:
            x = self._stream.prompt(index).x
        else:
            x = self._vectors[index * size : (index + 1) * size]
        for layer in self._layers:
            yield x[:, layer] if rows is None else x[rows, layer]
