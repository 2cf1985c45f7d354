"""``python -m fxprune`` is the command line."""

import sys

from fxprune.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
