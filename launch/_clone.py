"""Imported by `python launch/NAME.py`: lets a clone run without being installed.

Python puts the script's own folder on `sys.path`; the packages lie one above it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
