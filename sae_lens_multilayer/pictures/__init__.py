"""Pictures of results, the HTML report and its browser of latents.

Each class of result describes its pictures (`Result.pictures`) in plain values. `draw`
renders a description with matplotlib, `draw_interactive` with plotly.
"""

from sae_lens_multilayer.pictures.description import Picture, pictures_of
from sae_lens_multilayer.pictures.render_matplotlib import draw, save_figure
from sae_lens_multilayer.pictures.render_plotly import draw_interactive
from sae_lens_multilayer.pictures.sweeps import describe_sweep

__all__ = [
    "Picture",
    "describe_sweep",
    "draw",
    "draw_interactive",
    "pictures_of",
    "save_figure",
]
