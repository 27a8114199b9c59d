"""The floors of docs/architecture.md: which module may import which, and what is cheap to import."""

import ast
import graphlib
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("pangea_jax", "configs", "eval", "launch", "benchmarks")
# From the ground up. A module belongs to the longest name here that it begins with, and may import from its own floor
# and from those below it. A module or package that has no name here is an error: give it a floor.
FLOORS = (
    (
        "assets",
        "typed_config",
        "languages",
        "language_id",
        "anyres",
        "sharding",
        "topologies",
        "work",
        "figures",
    ),
    ("batch", "model", "data"),
    ("data.build",),
    ("checkpoints", "generate", "train", "curation"),
    ("sample",),
    # `pangea_jax` itself is load().
    ("pangea_jax", "experiment", "serving"),
    ("configs",),
    ("eval",),
    ("launch",),
    ("benchmarks",),
)
# Pairs of the same floor that never import each other.
STRANGERS = {frozenset({"model", "data"})}
# Exceptions that should be removed: (importing module, imported module from a higher floor).
CLIMBING: set[tuple[str, str]] = set()
# File names that several modules may have.
RECURRING = {
    "__init__",
    # launch/NAME.py and benchmarks/NAME.py run or time the library's module of that name.
    *("convert", "chat", "decode", "serve"),
    # configs/curation/NAME.py fills the config of pangea_jax/curation/NAME.py.
    *("cultural", "ocr", "translate"),
}


def find_modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for path in (path for top in TOPS for path in (ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = find_modules()


def without_type_checking(tree: ast.AST):
    """All nodes except those under `if TYPE_CHECKING:`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from without_type_checking(node)


def imports_of(module: str) -> set[str]:
    """The project's modules that `module` imports, also within functions."""
    found = set()
    for node in without_type_checking(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{MODULES[module]}:{node.lineno} is a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return (found & MODULES.keys()) - {module}


IMPORTS = {module: imports_of(module) for module in MODULES}


def room_of(module: str) -> str:
    """The longest name of FLOORS that a module begins with."""
    name = module.removeprefix("pangea_jax.")
    rooms = [room for floor in FLOORS for room in floor if f"{name}.".startswith(f"{room}.")]
    assert rooms, f"{module} has no floor; give it one in FLOORS and in docs/architecture.md"
    return max(rooms, key=len)


def floor_of(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


@pytest.mark.parametrize("top", TOPS)
def test_no_import_climbs(top):
    climbing = set()
    for module in (name for name in MODULES if name.split(".")[0] == top):
        here = room_of(module)
        for other in IMPORTS[module]:
            there = room_of(other)
            if floor_of(there) > floor_of(here) or {here, there} in STRANGERS:
                climbing.add((module, other))
    known = {pair for pair in CLIMBING if pair[0].split(".")[0] == top}
    assert climbing - known == set(), "these imports climb"
    assert known - climbing == set(), "remove these from CLIMBING: they are gone"


def test_no_import_goes_in_a_circle():
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        pytest.fail("imports go in a circle: " + " <- ".join(error.args[1]))


def test_one_name_means_one_job():
    paths = defaultdict(list)
    for path in MODULES.values():
        paths[path.stem].append(str(path.relative_to(ROOT)))
    recurring = {name: found for name, found in paths.items() if len(found) > 1}
    assert {name: found for name, found in recurring.items() if name not in RECURRING} == {}
    assert RECURRING - recurring.keys() == set(), "remove these from RECURRING: they are gone"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        # Each of them alone takes longer than the 0.3 s allowed for `import pangea_jax`.
        ("pangea_jax", {"jax", "numpy"}),
        ("pangea_jax.languages", {"jax", "numpy"}),
        # `launch/train.py --help` may take 3 s. It takes half of that without these, and more than 4 s with them.
        ("launch.train", {"torch", "matplotlib", "scipy.stats"}),
    ],
)
def test_an_import_loads_nothing_heavy(module, heavy):
    code = f"import sys, {module}; print(*({heavy} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "", f"{module} imports {run.stdout}"


def test_the_map_of_the_house_names_files_that_are_there():
    """docs/architecture.md, "Where is it?": every file exists and contains the names in its row."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split("## Where is it?")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        answer = row.split("|")[2]
        names = re.findall(r"`([\w/.]+)`", answer)
        files = [name for name in names if "/" in name and "NAME" not in name]
        assert files, row
        found = [ROOT / name for name in files]
        found = [
            path if path.exists() else ROOT / "pangea_jax" / path.relative_to(ROOT)
            for path in found
        ]
        assert all(path.exists() for path in found), row
        source = "".join(path.read_text(encoding="utf-8") for path in found if path.is_file())
        assert all(name.split(".")[0] in source for name in names if "/" not in name), row
