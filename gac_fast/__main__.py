"""``python -m gac_fast``: the command ``gac-fast``."""

import sys

from gac_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
