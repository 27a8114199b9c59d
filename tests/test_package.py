"""Checks what pyproject.toml declares for `pip install .`, without building the package."""

import ast
import importlib.util
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DATA = PROJECT["tool"]["setuptools"]["package-data"]


@pytest.mark.parametrize("command", ["pangea-train", "pangea-eval"])
def test_a_command_calls_a_function_that_is_there(command):
    module, _, function = PROJECT["project"]["scripts"][command].partition(":")
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    required = len(found.args.args) - len(found.args.defaults)
    assert required == 0, "a command is called without arguments"


@pytest.mark.parametrize("package", DATA)
def test_every_file_that_is_no_module_is_packed(package):
    files = [path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*")]
    missing = [
        str(path)
        for path in files
        if (ROOT / package / path).is_file()
        and path.suffix not in (".py", ".pyc")
        and not any(fnmatch(str(path), pattern.replace("**/", "")) for pattern in DATA[package])
    ]
    assert missing == []


@pytest.mark.parametrize("extra", ["eval", "curation", "gcs", "serve"])
def test_an_extra_has_the_lines_of_its_requirements_file(extra):
    lines = (ROOT / f"requirements-{extra}.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    wanted = {str(Requirement(line)) for line in lines if line}
    found = {str(Requirement(line)) for line in PROJECT["project"]["optional-dependencies"][extra]}
    assert found == wanted
