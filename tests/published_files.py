"""Files of published checkpoints, created from the paper's data."""

import io
import json
from typing import Any

import torch
from conftest import PAPER_DATA
from safetensors.torch import load_file, save
from torch import Tensor

_LENS_MLSAE = "lens_mlsae.safetensors"
_AUTOENCODER = ("encoder.weight", "decoder.weight", "pre_encoder_bias")


def paper_tensors(source: str = "plain.safetensors") -> dict[str, Tensor]:
    """Weights of an autoencoder of the paper's code, under their published names."""
    stored = load_file(PAPER_DATA / source)
    return {name: stored[name] for name in _AUTOENCODER}


def paper_config(kind: str, **changes: Any) -> bytes:
    """A `config.json` as the paper's code wrote it: "mlsae" or "mlsae-tfm"."""
    settings = json.loads((PAPER_DATA / "published" / f"{kind}.json").read_text())
    return json.dumps({**settings, **changes}).encode()


def plain_files(**more: Tensor) -> dict[str, bytes]:
    """The files of a published MLSAE."""
    return _files(paper_config("mlsae"), {**paper_tensors(), **more})


def transformer_files(**changes: Any) -> dict[str, bytes]:
    """The files of a published `-tfm`: the autoencoder and the transformer in one."""
    return _transformer_files(paper_tensors(), {}, changes)


def lens_files() -> dict[str, bytes]:
    """The files of a published `-lens`, which do not contain the lens."""
    return _files(paper_config("mlsae"), paper_tensors(_LENS_MLSAE))


def lens_transformer_files(**changes: Any) -> dict[str, bytes]:
    """The files of a published `-lens-tfm`, with the lens and its unembedding."""
    lens = {f"lens.layer_translators.{k}": v for k, v in paper_lens().items()}
    lens["lens.unembed.unembedding.weight"] = torch.ones(512, 64)
    changes = {"tuned_lens": True, **changes}
    return _transformer_files(paper_tensors(_LENS_MLSAE), lens, changes)


def paper_lens(n_layers: int = 5) -> dict[str, Tensor]:
    """The tensors of the paper's lens, of a model of five blocks.

    Further blocks use the translator of the last one.
    """
    stored = load_file(PAPER_DATA / "lens.safetensors")
    return {
        f"{layer}.{name}": stored[f"{min(layer, 4)}.{name}"].clone()
        for layer in range(n_layers)
        for name in ("weight", "bias")
    }


def tuned_lens_files(n_layers: int = 6) -> dict[str, bytes]:
    """The files of a lens saved by tuned-lens."""
    params = io.BytesIO()
    torch.save(paper_lens(n_layers), params)
    config = {
        "base_model_name_or_path": "EleutherAI/pythia-70m-deduped",
        "d_model": 64,
        "num_hidden_layers": n_layers,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": "88",
        "lens_type": "linear_tuned_lens",
    }
    return {"config.json": json.dumps(config).encode(), "params.pt": params.getvalue()}


def _transformer_files(
    autoencoder: dict[str, Tensor], more: dict[str, Tensor], changes: dict[str, Any]
) -> dict[str, bytes]:
    model = load_file(PAPER_DATA / "model" / "model.safetensors")
    tensors = {f"autoencoder.{k}": v for k, v in autoencoder.items()}
    tensors |= {f"transformer.model.{k}": v for k, v in model.items()}
    return _files(paper_config("mlsae-tfm", **changes), tensors | more)


def _files(config: bytes, tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        "config.json": config,
        "model.safetensors": save(tensors),
        "README.md": b"---\nlibrary_name: mlsae\n---\n",
    }
