"""`python -m memlm.cli`, for where the `memlm` script is not on the path."""

import sys

from memlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
