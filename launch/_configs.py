"""Config files of the installed package, for commands that run outside a clone."""

import importlib.util
from pathlib import Path


def find(path: str) -> str:
    """The file that `--config=PATH[:ARGUMENTS]` names, arguments kept.

    Args:
      path: as given on the command line. A file that exists is taken as it is. One that does not and begins with
        "configs/" is looked up in the installed package `configs`.

    Returns:
      A path that exists, or `path` unchanged, so that the reader of the flag reports it.
    """
    name, colon, arguments = path.partition(":")
    package = importlib.util.find_spec("configs")
    if Path(name).exists() or not name.startswith("configs/") or package is None:
        return path
    for folder in package.submodule_search_locations or ():
        installed = Path(folder, name.removeprefix("configs/"))
        if installed.is_file():
            return f"{installed}{colon}{arguments}"
    return path
