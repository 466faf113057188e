"""`python -m quantize`, which launchers take in the place of a script."""

from quantize.cli import run

run()
