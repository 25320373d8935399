"""Check of this package with TransformerLens 4, which has no HookedTransformer.

`make tl4` installs it into a folder of its own and runs this script there. SAELens
cannot be imported with it yet; stand-ins for the names that SAELens imports and that
TransformerLens removed let the rest be checked.
"""

import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformer_lens
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.utilities import defaults_utils, lm_utils, tokenize_utils

FOLDER = str(Path(__file__).parent / "data" / "paper" / "model")


class Removed:
    """Stands in for a class that TransformerLens 4 removed."""


def stand_in(name: str, **members: Any) -> None:
    module = ModuleType(f"transformer_lens.{name}")
    module.__dict__.update(members, __path__=[])
    sys.modules[module.__name__] = module


def import_host() -> str | None:
    """Import SAELens; why that needs stand-ins, or None if it does not."""
    try:
        import sae_lens
    except ImportError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{Path(frame.filename).name}, line {frame.lineno}: {error}"
    else:
        return None
    for name in [name for name in sys.modules if name.split(".")[0] == "sae_lens"]:
        del sys.modules[name]
    stand_in(
        "HookedTransformer",
        HookedRootModule=HookedRootModule,
        HookedTransformer=Removed,
        Loss=Removed,
        Output=Removed,
    )
    members = vars(defaults_utils) | vars(lm_utils) | vars(tokenize_utils)
    stand_in("utils", **{n: v for n, v in members.items() if not n.startswith("__")})
    stand_in("components")
    stand_in("components.mlps")
    stand_in("components.mlps.can_be_used_as_mlp", CanBeUsedAsMLP=Removed)
    host: Any = transformer_lens
    host.HookedTransformer = Removed
    import sae_lens  # noqa: F401  (with the stand-ins)

    del host.HookedTransformer
    return reason


def check(class_name: str, hook_name: str) -> None:
    """Load a model from a folder, read its vectors and evaluate an SAE on it."""
    from sae_lens_multilayer import MultiLayerSAE, MultiLayerSAEConfig, evaluate
    from sae_lens_multilayer.models.kinds import as_model
    from sae_lens_multilayer.models.loading import load_by_name, shape_by_name

    hook_names = [hook_name.format(layer=layer) for layer in range(5)]
    raw = load_by_name(class_name, FOLDER, {}, "cpu", hook_names)
    model = as_model(raw)
    assert model.shape == shape_by_name(class_name, FOLDER)
    tokens = torch.arange(1, 33).view(2, 16)
    assert [x.shape for x in model.vectors(tokens, hook_names)] == [(2, 16, 64)] * 5
    torch.manual_seed(0)
    sae = MultiLayerSAE(MultiLayerSAEConfig(d_in=64, d_sae=256, k=4))
    sae.cfg.metadata.hook_names = hook_names
    fast, slow = (
        evaluate(sae, raw, tokens, from_middle=from_middle).to_dataframe()
        for from_middle in (True, False)
    )
    difference = float((fast - slow).abs().max(axis=None))
    assert difference < 1e-4, difference
    print(f"{class_name}: vectors and evaluation work; differences {difference:.1e}")


def main() -> None:
    print(f"transformer-lens {version('transformer-lens')}")
    assert int(version("transformer-lens").split(".")[0]) >= 4
    reason = import_host()
    if reason is not None:
        print(f"sae-lens {version('sae-lens')} needs stand-ins: {reason}")
    from sae_lens_multilayer.models.loading import shape_by_name

    check("TransformerBridge", "blocks.{layer}.hook_resid_post")
    check("AutoModelForCausalLM", "gpt_neox.layers.{layer}")
    try:
        shape_by_name("HookedTransformer", "gpt2")
    except ValueError as error:
        print(f"HookedTransformer: {error}")
    else:
        raise AssertionError("a HookedTransformer cannot be described")


if __name__ == "__main__":
    with torch.no_grad():
        main()
