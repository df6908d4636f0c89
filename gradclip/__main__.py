"""Lets ``python -m gradclip`` do what ``gradclip`` does."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
