"""The arms of the synthetic study: ways to find features in the same vectors."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_lens_multilayer.analysis.active import ActiveLatents, active_latents
from sae_lens_multilayer.config import MultiLayerConfig
from sae_lens_multilayer.evaluation.encoder import LayerEncoder
from sae_lens_multilayer.lens.closed_form import fit_closed_form, rotation
from sae_lens_multilayer.lens.config import LensConfig, LensKind
from sae_lens_multilayer.lens.lens import LayerLens
from sae_lens_multilayer.sae.config import (
    CrosscoderTrainingSAEConfig,
    MultiLayerTrainingSAEConfig,
)
from sae_lens_multilayer.sae.crosscoder import CrosscoderTrainingSAE
from sae_lens_multilayer.sae.multi_layer_sae import MultiLayerTrainingSAE
from sae_lens_multilayer.studies.synthetic.matching import chain, join_tokens
from sae_lens_multilayer.studies.synthetic.source import SyntheticSource
from sae_lens_multilayer.studies.synthetic.streams import SyntheticStream
from sae_lens_multilayer.training.runner import MultiLayerSAETrainingRunner


@dataclass(frozen=True)
class Found:
    """What an arm has found."""

    acts: ActiveLatents
    """Of its latents, at the held-out tokens."""
    decoder: Float[Tensor, "layer latent d_in"]
    """The latents' directions at each layer, in raw space."""


class Bench:
    """A stream with its training and held-out vectors, which all arms share."""

    def __init__(
        self,
        stream: SyntheticStream,
        training: Callable[[LayerLens | None], MultiLayerConfig[Any]],
        n_prompts: int,
        n_held_out: int,
    ) -> None:
        """Generate the vectors.

        Args:
            training: The config of a run, with a lens or none.
            n_prompts: Prompts to train on, the first ones.
            n_held_out: Prompts to measure on, the following ones.
        """
        self.stream, self._training = stream, training
        self.hook_names = stream.cfg.hook_names
        size, shape = stream.cfg.context_size, (len(self.hook_names), stream.cfg.d_in)
        self.vectors = torch.empty(n_prompts * size, *shape)
        for i, rows in enumerate(self.vectors.split(size)):
            rows.copy_(stream.prompt(i).x)
        held_out = [stream.prompt(n_prompts + i) for i in range(n_held_out)]
        self.x = torch.cat([tokens.x for tokens in held_out])
        self.truth = join_tokens([tokens.truth for tokens in held_out])
        self._n_prompts = n_prompts

    def train(
        self,
        lens: LayerLens | None = None,
        hook_names: list[str] | None = None,
        **changes: Any,
    ) -> TrainingSAE[Any]:
        """Train an SAE on all layers or some; `changes` are of the run's settings."""
        source = SyntheticSource(
            self.stream, self._n_prompts, hook_names, vectors=self.vectors
        )
        cfg = self._training(lens).replaced(**changes)
        return MultiLayerSAETrainingRunner(cfg, override_source=source).run()

    @cached_property
    def mlsae(self) -> TrainingSAE[Any]:
        """The SAE of all layers without a lens."""
        return self.train()

    @cached_property
    def true_lens(self) -> LayerLens:
        """The map of each layer's true directions to those of the last one.

        For a common rotation, its inverse; for one of each feature, the nearest
        rotation. Growth and biases are undone too.
        """
        cfg, directions = self.stream.cfg, self.stream.directions.double()
        last = cfg.n_layers - 1
        growth = [cfg.growth**layer for layer in range(cfg.n_layers)]
        means = [
            g * b for g, b in zip(growth, self.stream.biases.double(), strict=True)
        ]
        turns = [rotation(d.T @ directions[last]) for d in directions[:last]]
        turns.append(torch.eye(cfg.d_in, dtype=torch.float64))
        maps = [growth[last] / g * a for g, a in zip(growth, turns, strict=True)]
        shifts = [means[last] - m @ a for m, a in zip(means, maps, strict=True)]
        return LayerLens.from_maps(self.lens_config("procrustes"), maps, shifts)

    def lens_config(self, kind: LensKind) -> LensConfig:
        """The settings of a lens of the stream's layers."""
        cfg = self.stream.cfg
        return LensConfig(self.hook_names, cfg.n_layers, cfg.d_in, kind=kind)

    def found(self, sae: TrainingSAE[Any], x: Tensor | None = None) -> Found:
        """Activations of a multi-layer SAE on the held-out vectors, or on `x`."""
        encoder = LayerEncoder(sae, self.hook_names)
        acts = active_latents(encoder, self.x if x is None else x)
        decoder = sae.W_dec.detach().expand(len(self.hook_names), -1, -1)
        lens: LayerLens | None = getattr(sae, "lens", None)
        if lens is not None:
            layers = range(len(self.hook_names))
            rows = [lens.invert_difference(decoder[i], i) for i in layers]
            decoder = torch.stack(rows)
        return Found(acts, decoder)

    def found_by_layer(
        self, saes: list[TrainingSAE[Any]], joint: list[Tensor]
    ) -> Found:
        """Activations of one SAE for each layer, as those of joint latents."""
        parts: list[ActiveLatents] = []
        decoder = torch.empty(len(saes), *saes[0].W_dec.shape)
        for layer, (sae, names) in enumerate(zip(saes, joint, strict=True)):
            encoder = LayerEncoder(sae, [self.hook_names[layer]])
            acts = active_latents(encoder, self.x[:, layer : layer + 1])
            acts.layer += layer
            acts.latent = names[acts.latent]
            decoder[layer, names] = sae.W_dec.detach()
            parts.append(acts)
        order = torch.cat([p.token for p in parts]).argsort(stable=True)
        columns = ("token", "layer", "latent", "value")
        joined = [torch.cat([getattr(p, n) for p in parts])[order] for n in columns]
        sizes = len(self.x), len(saes), decoder.shape[1]
        return Found(ActiveLatents(*sizes, *joined), decoder)

    def crosscoder(self) -> Found:
        """A crosscoder with as many latents, and k for a token instead of a vector.

        It keeps `l0` latents, the mean number of features of a token. At a layer, a
        latent has the token's activation times the norm of its decoder there, so its
        distribution over layers is the same at all tokens.
        """
        cfg = self._training(None).sae
        values: dict[str, Any] = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
        values |= {
            "k": max(cfg.k, round(self.stream.cfg.l0)),
            "metadata": SAEMetadata(),
        }
        sae = self.train(sae=CrosscoderTrainingSAEConfig(**values))
        assert isinstance(sae, CrosscoderTrainingSAE)
        acts = active_latents(LayerEncoder(sae, self.hook_names), self.x)
        return Found(acts, sae.decoders.detach())

    def dictionary(self, layer: int) -> TrainingSAE[Any]:
        """An SAE of one layer with the true directions as decoder and as encoder.

        As all SAEs start: the encoder is the decoder's transpose, with TopK. It is no
        upper bound: a trained encoder can separate features that are not orthogonal.
        """
        d = self.stream.directions[layer]
        k = min(self._training(None).sae.k, len(d))
        cfg = MultiLayerTrainingSAEConfig(d_in=d.shape[1], d_sae=len(d), k=k)
        sae = MultiLayerTrainingSAE(cfg)
        sae.W_dec.data.copy_(d)
        sae.W_enc.data.copy_(d.T)
        sae.b_dec.data.zero_()
        return sae


def _shuffled(bench: Bench) -> Found:
    """The vectors of each token in a random order of layers."""
    with temporary_seed(bench.stream.cfg.seed):
        order = torch.rand(bench.x.shape[:2]).argsort(1)
    x = bench.x.gather(1, order[:, :, None].expand_as(bench.x))
    return bench.found(bench.mlsae, x)


def _single_layers(bench: Bench) -> Found:
    saes = [bench.train(hook_names=[name]) for name in bench.hook_names]
    return bench.found_by_layer(saes, chain([sae.W_dec.detach() for sae in saes]))


def _ceiling(bench: Bench) -> Found:
    saes = [bench.dictionary(layer) for layer in range(len(bench.hook_names))]
    names = torch.arange(bench.stream.cfg.n_features)
    return bench.found_by_layer(saes, [names] * len(saes))


def _fitted(bench: Bench, kind: LensKind) -> Found:
    lens = fit_closed_form([bench.vectors], bench.lens_config(kind))
    return bench.found(bench.train(lens))


@dataclass(frozen=True)
class Arm:
    """A way to find features."""

    description: str
    """In figures and tables."""
    find: Callable[[Bench], Found]


ARMS: dict[str, Arm] = {
    "mlsae": Arm("MLSAE", lambda b: b.found(b.mlsae)),
    "true_lens": Arm("MLSAE, true lens", lambda b: b.found(b.train(b.true_lens))),
    "procrustes": Arm("MLSAE, Procrustes lens", lambda b: _fitted(b, "procrustes")),
    "least_squares": Arm(
        "MLSAE, least-squares lens", lambda b: _fitted(b, "least_squares")
    ),
    "whitening": Arm("MLSAE, whitened layers", lambda b: _fitted(b, "whitening")),
    "single_layers": Arm("single-layer SAEs, joined", _single_layers),
    "crosscoder": Arm("crosscoder", Bench.crosscoder),
    "ceiling": Arm("ceiling: true dictionary", _ceiling),
    "floor": Arm("floor: layers shuffled", _shuffled),
}
"""All arms by name; a new one is a row here."""
