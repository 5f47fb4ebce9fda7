"""Makes tests/support importable as `support`, and brings in its fixtures."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

pytest_plugins = ["support.bundles", "support.mosquitto", "support.secured"]
