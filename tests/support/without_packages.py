"""Python without some packages, as it is on a machine that has only the numeric ones.

    python -m tests.support.without_packages PACKAGE,PACKAGE... import MODULE...
    python -m tests.support.without_packages PACKAGE,PACKAGE... run SCRIPT [ARGUMENT...]

Imports the modules, or does what `python SCRIPT ARGUMENT...` does.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Sequence


class Missing:
    """An importer that finds none of the packages named, before any other looks for them."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def run() -> None:
    packages, what, *names = sys.argv[1:]
    sys.meta_path.insert(0, Missing(packages.split(",")))
    if what == "import":
        for name in names:
            importlib.import_module(name)
    else:
        sys.argv = names
        runpy.run_path(names[0], run_name="__main__")


if __name__ == "__main__":
    run()
