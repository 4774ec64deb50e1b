"""The benchmarks. Scripts, pytest and ``python -m benchmarks.gpu`` alike import the files here by their plain names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
