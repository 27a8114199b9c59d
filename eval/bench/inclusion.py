"""Reads the files of `--include`: YAMLs and Python files with tasks of one's own (own_tasks.py).

A YAML is data: it has the keys of lm-eval that are listed here, and nothing in it is executed. A Python file is the
user's own code, so it is executed, but only if the command line names it itself.
"""

import difflib
import importlib.util
import inspect
import math
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from eval.bench.documents import DataError, own_fault
from eval.bench.own_tasks import LIKELIHOOD, READERS, Declaration, DeclaredTask, OwnTask, Template
from eval.bench.task import Dataset, Generation
from eval.bench.tasks import TAKEN
from pangea_jax import languages
from pangea_jax.work import untrusted

_MOST_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_YAML = (".yaml", ".yml")


class _Key(NamedTuple):
    kinds: tuple[type, ...]
    expected: str


_TEXT, _MAPPING = _Key((str,), "a text"), _Key((dict,), "a mapping")
_KEYS: Mapping[str, _Key] = {
    "task": _TEXT,
    "task_alias": _TEXT,
    "language": _TEXT,
    "dataset_path": _TEXT,
    "dataset_kwargs": _MAPPING,
    "test_split": _TEXT,
    "description": _TEXT,
    "doc_to_text": _TEXT,
    "doc_to_target": _TEXT,
    "doc_to_choice": _Key((str, list), "the name of a field, or a list of texts"),
    "doc_to_image": _Key((str,), "the name of a field"),
    "output_type": _TEXT,
    "target_delimiter": _TEXT,
    "reader": _TEXT,
    "rubric": _Key((str, dict), "the name of a field, or a mapping"),
    "metric_list": _Key((list,), "a list such as [{metric: acc}]"),
    "generation_kwargs": _MAPPING,
    "metadata": _MAPPING,
}
# What a class of one's own must have: name, type, example.
_ATTRIBUTES = (
    ("name", str, 'a text, as in name = "quiz"'),
    ("fields", Mapping, 'fields of a row and their types, as in fields = {"question": str}'),
    ("generation", Generation, "such as Generation(max_new_tokens=16)"),
    ("subsets", tuple, "those that OwnTask makes of files"),
)
_NEEDED = ("task", "dataset_kwargs", "doc_to_text", "doc_to_target")
# Keys of lm-eval that mean code, or another task.
_CODE = ("process_docs", "process_results", "filter_list", "include", "group", "fewshot_config")


class _Loader(yaml.SafeLoader):
    """Values without tags; `no` is Norwegian, not false, and a key may stand once."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in found if not tag.endswith((":bool", ":timestamp"))]
    for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|false|False)$"), list("tTfF")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str) or key in found:
            problem = f"key {key!r:.60} " + ("stands twice" if key in [*found] else "is no text")
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read(paths: Iterable[Path]) -> list[Dataset]:
    """The data sets of YAMLs, Python files, and all YAMLs of folders.

    Raises:
      DataError: a file is wrong, or a name is taken; the message names file and key.
    """
    found: dict[str, Dataset] = {}
    for path in (file for given in paths for file in _files(given)):
        for dataset in [_declared(path)] if path.suffix in _YAML else _written(path):
            name = dataset.name
            if name in found or name in TAKEN:
                owner = "another file of --include" if name in found else "PangeaBench"
                raise DataError(
                    f"{path}: the task name {name!r} is taken by {owner}; choose another"
                )
            if clash := [s.name for s in dataset.subsets if f"{name}_{s.name}" in TAKEN]:
                raise DataError(
                    f"{path}: the task {name}_{clash[0]} is one of PangeaBench; choose another name"
                )
            found[name] = dataset
    return list(found.values())


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.suffix not in (*_YAML, ".py"):
            raise DataError(f"--include={path}: expected a .yaml or .py file, or a folder of YAMLs")
        if not path.is_file():
            raise DataError(f"--include={path}: no such file")
        return [path]
    # Python files beside them may be anything; who wants one executed names it.
    if not (files := sorted(file for file in path.iterdir() if file.suffix in _YAML)):
        raise DataError(
            f"--include={path}: no .yaml file in this folder; name Python files one by one"
        )
    return files


def _written(path: Path) -> list[Dataset]:
    """The tasks whose classes a Python file defines."""
    spec = importlib.util.spec_from_file_location(f"own_task_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        kinds = [
            kind
            for kind in vars(module).values()
            if inspect.isclass(kind) and kind.__module__ == module.__name__
        ]
        made = [k() for k in kinds if issubclass(k, Dataset) and not inspect.isabstract(k)]
    except (Exception, SystemExit) as error:
        raise own_fault(error, path) from error
    for kind in kinds:
        is_base = any(isinstance(dataset, kind) for dataset in made)
        if issubclass(kind, Dataset) and inspect.isabstract(kind) and not is_base:
            missing = ", ".join(sorted(kind.__abstractmethods__))
            raise DataError(
                f"{path}: class {kind.__name__} has no method {missing}; docs/evaluation.md shows a whole class"
            )
    if not made:
        raise DataError(
            f"{path}: no task in it; expected a class derived from eval.bench.own_tasks.OwnTask with prompt and score"
        )
    for dataset in made:
        dataset.code = path
        if isinstance(dataset, OwnTask):
            dataset.folder = path.parent
            files = getattr(dataset, "files", None)
            if not isinstance(files, Mapping) or not files:
                raise DataError(
                    f"{path}: {type(dataset).__name__} needs files, as in {{'th': 'quiz.jsonl'}}"
                )
            dataset.files = {_language(code, path): str(file) for code, file in files.items()}
        for name, kind, example in _ATTRIBUTES:
            if not isinstance(getattr(dataset, name, None), kind):
                given = (
                    reprlib.repr(getattr(dataset, name)) if hasattr(dataset, name) else "missing"
                )
                raise DataError(
                    f"{path}: {name} of class {type(dataset).__name__} is {given}, expected {example}"
                )
        _check_name(dataset.name, path)
        dataset.title = getattr(dataset, "title", dataset.name)
    return made


def _declared(path: Path) -> DeclaredTask:
    """The task of a YAML."""
    values = _parse(path)
    for key, value in values.items():
        if key not in _KEYS:
            raise DataError(f"{path}: {_about_unknown(key)}")
        if not isinstance(value, _KEYS[key].kinds) or isinstance(value, bool):
            raise _wrong(path, key, value, _KEYS[key].expected)
    if missing := [key for key in _NEEDED if key not in values]:
        raise DataError(f"{path}: no key {missing[0]!r}; a task needs {', '.join(_NEEDED)}")
    _check_name(values["task"], path)
    if values.get("dataset_path", "json") != "json":
        raise _wrong(path, "dataset_path", values["dataset_path"], "json: data are files of JSON")
    reader = _reader(values, path)
    texts = {
        "text": _template(
            values.get("description", "") + values["doc_to_text"], "doc_to_text", path
        ),
        "target": _field(values["doc_to_target"], "doc_to_target", path),
        "choices": _choices(values, reader, path),
    }
    declared = Declaration(
        name=values["task"],
        title=values.get("task_alias", values["task"]),
        version=_version(values.get("metadata", {}), path),
        files=_data_files(values, path),
        reader=reader,
        metric=_metric(values.get("metric_list"), reader, path),
        generation=_generation(values, reader, path),
        image=values.get("doc_to_image"),
        delimiter=values.get("target_delimiter", " "),
        rubric=_rubric(values.get("rubric"), reader, path),
        **texts,
    )
    made = DeclaredTask(declared, path.parent)
    if isinstance(declared.rubric, dict):
        try:
            made.rubric({})
        except ValueError as error:
            raise DataError(f"{path}: rubric: {error}") from None
    return made


def _parse(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(untrusted.read_regular(path, _MOST_BYTES), _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = str(error.problem)
        if "could not determine a constructor" in problem:
            problem = "a tag such as !function means code, and a YAML executes nothing; write the task as a Python file"
        raise DataError(f"{path}, line {line}: {problem}") from None
    except yaml.reader.ReaderError as error:
        raise DataError(
            f"{path}: {error.reason} at byte {error.position}; save the file as UTF-8"
        ) from None
    except (yaml.YAMLError, OSError, RecursionError, ValueError) as error:
        raise DataError(f"{path}: no YAML ({error})"[:300]) from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected keys such as task and doc_to_text, got no mapping")
    return values


def _wrong(path: Path, key: str, value: Any, expected: str) -> DataError:
    return DataError(f"{path}: key {key!r} is {reprlib.repr(value)}, expected {expected}")


def _about_unknown(key: str) -> str:
    if key in _CODE:
        return (
            f"key {key!r} of lm-eval is not read here, because a YAML executes nothing; prepare the data, or write the "
            "task as a Python file"
        )
    near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_KEYS)}"
    return f"unknown key {key!r:.60}; {hint}"


def _check_name(name: Any, path: Path) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(path, "task", name, "up to 100 letters and digits of ASCII, _ . and -")


def _language(code: Any, path: Path) -> str:
    try:
        return languages.get(code).code
    except (KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: {error.args[0] if error.args else error}") from None


def _data_files(values: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Language -> file. With the key `language`, a mapping has the files of splits, as in lm-eval."""
    kwargs, language = values["dataset_kwargs"], values.get("language")
    files = kwargs.get("data_files")
    if unknown := sorted(kwargs.keys() - {"data_files"}):
        raise DataError(f"{path}: dataset_kwargs has {unknown[0]!r:.60}, expected data_files alone")
    if language and isinstance(files, dict):
        split = values.get("test_split", "test")
        if split not in files:
            raise DataError(
                f"{path}: data_files has no split {split!r}; name one of {', '.join(files)} with test_split"
            )
        files = files[split]
    if language and isinstance(files, str) and files:
        files = {language: files}
    if not isinstance(files, dict) or not all(isinstance(f, str) and f for f in files.values()):
        example = "a file and the key language, or files by language, as in {th: thai.jsonl}"
        raise _wrong(path, "dataset_kwargs: data_files", files, example)
    if not files:
        raise _wrong(path, "dataset_kwargs: data_files", files, "a file")
    return {_language(code, path): file for code, file in files.items()}


def _reader(values: Mapping[str, Any], path: Path) -> str:
    """How the answers are read: by log-likelihood, or what `reader` says."""
    kind, reader = values.get("output_type", "generate_until"), values.get("reader")
    known = [name for name in READERS if name != LIKELIHOOD]
    if kind == "multiple_choice":
        if reader:
            raise _wrong(path, "reader", reader, "none: multiple_choice compares log-likelihoods")
        return LIKELIHOOD
    if kind != "generate_until":
        raise _wrong(path, "output_type", kind, "generate_until or multiple_choice")
    if reader not in known:
        if reader is None:
            raise DataError(f"{path}: no key 'reader'; expected one of {', '.join(known)}")
        raise _wrong(path, "reader", reader, f"one of {', '.join(known)}")
    return reader


def _template(text: str, key: str, path: Path) -> Template:
    try:
        return Template.parse(text)
    except ValueError as error:
        raise DataError(f"{path}: key {key!r}: {error}") from None


def _field(text: str, key: str, path: Path) -> Template:
    """The name of a field, with or without braces, or a template."""
    return _template(text if "{" in text else f"{{{{{text}}}}}", key, path)


def _choices(
    values: Mapping[str, Any], reader: str, path: Path
) -> Template | tuple[str, ...] | None:
    given = values.get("doc_to_choice")
    if reader not in ("letter", LIKELIHOOD):
        if given is not None:
            raise _wrong(path, "doc_to_choice", given, f"none: the reader {reader} has no choices")
        return None
    if given is None:
        raise DataError(f"{path}: no key 'doc_to_choice'; it names the field with the choices")
    if isinstance(given, list):
        if not all(isinstance(text, str) for text in given):
            raise _wrong(path, "doc_to_choice", given, "texts; put numbers in quotes")
        return tuple(given)
    found = _field(given, "doc_to_choice", path)
    if len(found.parts) != 1 or isinstance(found.parts[0], str):
        raise _wrong(path, "doc_to_choice", given, "one field, as in {{choices}}")
    return found


def _metric(given: list | None, reader: str, path: Path) -> str:
    known = READERS[reader].metrics
    if given is None:
        return known[0]
    for entry in given:
        if not isinstance(entry, dict) or entry.get("metric") not in known:
            expected = f"metrics of the reader {reader}: {', '.join(known)}"
            raise _wrong(path, "metric_list", entry, expected)
        rules = {"aggregation": "mean", "higher_is_better": True, "metric": entry["metric"]}
        for name, value in entry.items():
            if name not in rules or value != rules[name]:
                raise DataError(
                    f"{path}: metric_list has {name}: {value!r:.40}; the score is the mean, and higher is better"
                )
    if not given:
        raise _wrong(path, "metric_list", given, "at least one metric")
    return given[0]["metric"]


def _generation(values: Mapping[str, Any], reader: str, path: Path) -> Generation:
    given = values.get("generation_kwargs", {})
    if reader == LIKELIHOOD:
        if given:
            raise _wrong(path, "generation_kwargs", given, "none: nothing is generated")
        # As in lm-eval the prompt is raw text; pictures need the chat template.
        return Generation(output_type=LIKELIHOOD, chat="doc_to_image" in values)
    known = ("max_gen_toks", "until", "temperature", "do_sample")
    if unknown := [name for name in given if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.3) or known
        raise DataError(
            f"{path}: generation_kwargs has {unknown[0]!r:.60}, expected {', '.join(near)}"
        )
    most, until = given.get("max_gen_toks", READERS[reader].max_new_tokens), given.get("until", [])
    until = [until] if isinstance(until, str) else until
    temperature = given.get("temperature", 0.0)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise _wrong(path, "max_gen_toks", most, "a number of tokens, 1 or more")
    if not isinstance(until, list) or not all(isinstance(text, str) and text for text in until):
        raise _wrong(path, "until", until, "a text or a list of texts")
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not is_number or not 0 <= temperature < math.inf:
        raise _wrong(path, "temperature", temperature, "a number, 0 or more")
    if given.get("do_sample", temperature > 0) is not (temperature > 0):
        raise _wrong(path, "do_sample", given["do_sample"], "the same as temperature: 0 is false")
    return Generation(most, tuple(until), float(temperature))


def _version(metadata: Mapping[str, Any], path: Path) -> int:
    version = metadata.get("version", 1)
    if isinstance(version, bool) or not isinstance(version, int | float) or version != int(version):
        raise _wrong(path, "metadata: version", version, "a whole number")
    return int(version)


def _rubric(given: Any, reader: str, path: Path) -> Any:
    if (given is None) == (reader == "judge"):
        expected = "a mapping, or a field with one" if reader == "judge" else "none without a judge"
        raise _wrong(path, "rubric", given, expected)
    return given
