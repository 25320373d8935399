"""Reads a lens of any kind, wherever it is."""

from collections.abc import Sequence
from pathlib import Path

from tuned_lens import TunedLens

from sae_lens_multilayer.lens.config import Alignment
from sae_lens_multilayer.lens.jacobian import lens_of_jacobians, read_jacobians
from sae_lens_multilayer.lens.lens import SETTINGS_FILENAME, LayerLens


def read_lens(
    source: TunedLens | LayerLens | str | Path,
    hook_names: Sequence[str],
    n_layers: int,
    alignment: Alignment = "tuned_lens",
) -> LayerLens:
    """Read the lens of some hooks.

    Args:
        source: A lens; a folder that `LayerLens.save` or tuned-lens wrote; a file of a
            Jacobian lens; or a name in tuned-lens' hub space.
        hook_names: The hooks, in the order of the layer axis.
        n_layers: Number of blocks of the model.
        alignment: Of a tuned lens; see `LensConfig`.
    """
    if isinstance(source, LayerLens):
        return source
    if not isinstance(source, TunedLens):
        path = Path(source).expanduser()
        if path.is_file():
            return lens_of_jacobians(read_jacobians(path), hook_names, n_layers)
        if (path / SETTINGS_FILENAME).is_file():
            lens = LayerLens.load(path)
            has_all = set(hook_names) <= set(lens.hook_names)
            return lens.select(hook_names) if has_all else lens
    return LayerLens.from_tuned_lens(source, hook_names, alignment=alignment)
