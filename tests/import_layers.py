"""Run import-linter on the layout as it installs (cli inside quantlab), which an editable install does not show.

Usage: import_layers.py FOLDER, where FOLDER holds that layout.
"""

import os
import sys
from pathlib import Path

from importlinter.cli import lint_imports

config = Path("pyproject.toml").resolve()
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
os.chdir(sys.argv[1])  # the linter looks here first
sys.exit(lint_imports(config_filename=str(config), no_cache=True))
