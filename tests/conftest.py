"""Set-up that every test shares: compiled kernels are kept apart from those that the user's own runs made."""

import os
import sys
from pathlib import Path

# edgert keys its kernels by the sources themselves, so one folder serves all states of the tree.
_base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
os.environ["XDG_CACHE_HOME"] = str(_base / "edgert-tests")
os.environ["XDG_STATE_HOME"] = str(_base / "edgert-tests" / "state")
sys.path.insert(0, str(Path(__file__).resolve().parent))  # tests/models.py, tests/toy_dense.py

from hypothesis import settings  # noqa: E402   # after the environment is set

settings.register_profile("edgert", deadline=None)  # a shared machine may stall
settings.load_profile("edgert")
