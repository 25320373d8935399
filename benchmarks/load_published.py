"""Claim: only the SAE is read from a `-tfm` checkpoint, with twice its size in memory.

Writes a file of the published format and size, an SAE and a transformer of zeros,
checks that the loaded SAE equals the written one, and prints the peak memory of loading
the SAE, one hook of it, and the whole file.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks._common import announced, peak_rss_mib, print_versions
from examples.local_hub import local_hub, put
from sae_lens_multilayer.published.releases import published_model

_RELEASE, _SAE_ID = "mlsae-pythia-70m-deduped", "x64-k32-tfm"
_CONFIG = b'{"k": 32, "expansion_factor": 64, "standardize": true}'


def main() -> None:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a smaller transformer")
    args = parser.parse_args()
    print_versions("torch", "sae-lens", "safetensors")
    with tempfile.TemporaryDirectory() as folder, local_hub(Path(folder)) as hub:
        model = published_model("pythia-70m-deduped")
        assert model is not None
        sae = autoencoder(model.d_in)
        path = write(hub, sae, transformer_mib=250 if args.small else 1500)
        sae_mib = sum(t.nbytes for t in sae.values()) / 2**20
        print(f"SAE {sae_mib:.0f} MiB in {path.stat().st_size / 2**20:.0f} MiB")
        with announced("the loaded SAE equals the written one"):
            loaded: Any = SAE.from_pretrained(_RELEASE, _SAE_ID)
            assert torch.equal(loaded.W_enc, sae["encoder.weight"].T)
            assert torch.equal(loaded.W_dec, sae["decoder.weight"].T)
        hook = f"{_SAE_ID}/{loaded.cfg.metadata.hook_names[0]}"
        del loaded
        turns: dict[str, Callable[[], object]] = {
            "the SAE": lambda: SAE.from_pretrained(_RELEASE, _SAE_ID),
            "one hook": lambda: SAE.from_pretrained(_RELEASE, hook),
            "the whole file": lambda: [t.sum() for t in load_file(path).values()],
        }
        for name, turn in turns.items():
            print(f"{name:16}peak {peak_rss_mib(turn):6.0f} MiB")


def autoencoder(d_in: int) -> dict[str, Tensor]:
    """Random weights under the names of the published files."""
    decoder = torch.nn.functional.normalize(torch.randn(d_in, 64 * d_in), dim=0)
    return {
        "encoder.weight": torch.randn(64 * d_in, d_in),
        "decoder.weight": decoder,
        "pre_encoder_bias": torch.zeros(d_in),
    }


def write(hub: Path, sae: dict[str, Tensor], transformer_mib: int) -> Path:
    """Put a `-tfm` checkpoint into the hub; returns the path of its tensors."""
    snapshot = put(hub, f"tim-lawson/{_RELEASE}-{_SAE_ID}", {"config.json": _CONFIG})
    tensors = {f"autoencoder.{name}": tensor for name, tensor in sae.items()}
    for layer in range(6):
        name = f"transformer.model.gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight"
        tensors[name] = torch.zeros(transformer_mib * 2**18 // 6)
    path = snapshot / "model.safetensors"
    save_file(tensors, path)
    return path


if __name__ == "__main__":
    main()
