"""`--config=configs/NAME.py` outside a clone."""

from pathlib import Path

import pytest

import configs
from launch import common

HERE = Path(next(iter(configs.__path__)))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("configs/sample.py", f"{HERE}/sample.py"),
        (
            "configs/pangea_7b_finetune.py:lora=16,batch=64",
            f"{HERE}/pangea_7b_finetune.py:lora=16,batch=64",
        ),
        ("configs/curation/ocr.py", f"{HERE}/curation/ocr.py"),
        # Not in the package either: the path stays as typed, and the error of the flag names it.
        ("configs/sampel.py", "configs/sampel.py"),
        ("sample.py", "sample.py"),
        ("elsewhere/configs/sample.py", "elsewhere/configs/sample.py"),
    ],
)
def test_a_config_is_found_in_the_installed_package(given, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert common.find_config(given) == found


def test_a_file_that_exists_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sample.py").touch()
    assert common.find_config("configs/sample.py:x=1") == "configs/sample.py:x=1"
