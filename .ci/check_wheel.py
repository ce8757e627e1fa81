"""Build the wheel, install it into an environment of its own and use it from there.

python .ci/check_wheel.py

What a checkout hides, a wheel shows: a file that was not packed, a public name that only the tests'
path makes importable. The new environment sees the installed dependencies of the Python that runs
this script, and nothing of the checkout. Exits with 1 and says what is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs in the new environment, outside the checkout. Every module is imported, then every name that
# a module calls public, so that lazy imports are followed; every recipe is read.
INSIDE = """
import importlib, pkgutil, sys
from pathlib import Path


def stay_here(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"importing memlm asks for {arguments} ({event}); nothing may, unasked")


sys.addaudithook(stay_here)
import memlm
from memlm.train.recipe import Recipe, read_yaml, shipped_recipes

home = Path(memlm.__file__).parent
assert home.is_relative_to(sys.prefix), f"memlm was imported from {home}, not from {sys.prefix}"
modules = ["memlm", *(m.name for m in pkgutil.walk_packages([str(home)], "memlm."))]
names = 0
for module_name in modules:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        # A module of an extra that is not installed says which one.
        if "pip install 'memlm[" not in str(error):
            raise
        print(f"passed over: {error}")
        continue
    for name in getattr(module, "__all__", ()):
        getattr(module, name)
        names += 1
# Read without `Recipe.load`, which also looks for the files that a recipe trains on.
recipes = shipped_recipes().values()
assert recipes, "no recipe is installed"
for recipe in recipes:
    Recipe.from_dict(read_yaml(recipe))
from memlm.pretrained import available_pretrained

shipped = available_pretrained()
assert shipped, "no trained model is installed"
for name in shipped:
    stream = memlm.DocumentStream(*memlm.load_pretrained(name))
    stream.write("John moved to the kitchen. Mary went to the garden. It rained.")
    said = stream.ask("Where is John?")
    assert said == "kitchen", f"the installed {name} says {said!r}"
counts = f"{len(modules)} modules, {names} public names, {len(recipes)} recipes, {len(shipped)} models"
print(f"{counts}: {memlm.__version__}")
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        # Neither the checkout nor anything else that the caller put on the path may help.
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

        def call(*command: str | Path) -> None:
            subprocess.run([str(part) for part in command], check=True, cwd=here, env=clean)

        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        call(*pip, "wheel", "--no-deps", "--wheel-dir", here / "dist", ROOT)
        (wheel,) = (here / "dist").glob("*.whl")
        missing = sorted(tracked_files() - set(zipfile.ZipFile(wheel).namelist()))
        if missing:
            print(f"{wheel.name} lacks {', '.join(missing)}", file=sys.stderr)
            return 1

        venv.create(here / "clean", with_pip=False)
        scripts = here / "clean" / ("Scripts" if os.name == "nt" else "bin")
        python = scripts / "python"
        call(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
        add_dependencies(python)
        (here / "inside.py").write_text(INSIDE)
        call(python, "-I", here / "inside.py")
        call(scripts / "memlm", "--version")
    return 0


def tracked_files() -> set[str]:
    """The package's files as git knows them, relative to the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "memlm"], check=True, cwd=ROOT, capture_output=True, text=True
    )
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def add_dependencies(python: Path) -> None:
    """Let `python` see what is installed beside the running one.

    Folders named in a .pth file come last, behind the installed wheel, and their own .pth files are
    not followed: an editable installation of memlm there stays out of sight.
    """
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(found.stdout.strip(), "dependencies.pth").write_text("\n".join(folders) + "\n")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        # The command has told what went wrong; our own traceback would only hide it.
        sys.exit(error.returncode or 1)
