"""The `memlm` command: thin over the functions of the package, a module per command.

torch and transformers are imported when a command needs them, so that `--help` answers at once.
parsing: reads what was typed. options, models, printing: shared by several commands.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from memlm.cli.parsing import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 failed, 2 a mistake of the user, 130 interrupted."""
    arguments = argparse.Namespace(debug=False)
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("\nmemlm: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has left; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"memlm: error: {error}", file=sys.stderr)
        return 2
