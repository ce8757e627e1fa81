"""The lower bounds of pyproject.toml as constraints: what `make test-min` installs.

python .ci/lowest.py [--except NAME ...] > constraints-min.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["peft"]]
    for requirement in wanted:
        found = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        if found is None:
            raise SystemExit(f"{requirement!r} in pyproject.toml has no lower bound; give it one")
        if found[1] not in sys.argv[2:]:
            print(f"{found[1]}=={found[2]}")


if __name__ == "__main__":
    main()
