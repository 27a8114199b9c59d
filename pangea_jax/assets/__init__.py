"""Where the files that the package ships with lie."""

from pathlib import Path

# The embedded sample: records, drawings, vocabulary.
EMOJI = Path(__file__).parent / "emoji"
# The model trained on it.
SAMPLE_MODEL = Path(__file__).parent / "sample_model"
