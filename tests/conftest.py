"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadline: how long an example takes says nothing on a loaded machine. In CI the same examples on each run.
settings.register_profile("dray", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("dray")
