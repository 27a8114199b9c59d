"""Lets `python launch/NAME.py` run in a clone that is not installed.

Python puts only the folder of the script on `sys.path`. The packages are in the folder above it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
