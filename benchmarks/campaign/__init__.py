"""A campaign of damage: `python -m benchmarks.campaign`."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tests'))  # its helpers make runs, inputs and strangers
os.environ['JAX_PLATFORMS'] = 'cpu'
