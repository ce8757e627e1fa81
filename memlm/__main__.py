"""`python -m memlm`: what launchers such as `accelerate launch -m memlm eval ...` start."""

import sys

from memlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
