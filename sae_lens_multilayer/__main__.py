"""`python -m sae_lens_multilayer` is the command `sae-lens-multilayer`."""

from sae_lens_multilayer.cli import main

main()
