"""Runs the ``gradclip`` command as ``python -m gradclip``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
