"""English instruction records into other languages, as the paper's 1.28M translated ones (section 2.1).

    python launch/curate.py translate --config=configs/curation/translate.py --out=data/translated \\
        --config.source=PangeaInstruct/PangeaIns.json --config.languages=sw,yo --config.limit=1000 \\
        --config.llm.model=NAME --config.llm.base_url=http://localhost:8000/v1
    python launch/build_data.py pangeains --source=data/translated/records --images=PangeaInstruct --out=data/store

The endpoint is any that speaks OpenAI's protocol: vLLM (`vllm serve NAME`), Gemini's
(https://generativelanguage.googleapis.com/v1beta/openai/), a hosted one; its key is in OPENAI_API_KEY. Start with
--config.limit=100 and read data/translated/report.md: what was dropped, why, and how well a sample reads when it is
translated back. Stopped, killed or out of budget, the same command goes on and pays for nothing twice; with a higher
limit give another --out.

A new language takes its tag in `languages` (one that pangea_jax/languages.py lacks, a line there too; docs/data.md, "A
new language"). What a model should know of it, such as its orthography, goes into `notes`. A config of your own:

    from configs.curation import translate

    def get_config(arg=None):
        config = translate.get_config(arg)
        config.languages = ("yo",)
        config.notes.yo = "Write the standard orthography with its tone marks and underdots."
        return config

Cost: the 60 English records of the official sample take 490 tokens of prompt on average, 194 of them instructions, and
some 290 of reply in Latin letters, more in other scripts (Qwen's vocabulary). A million records in one language are
then about $1,900 at $1 and $5 per million tokens, and what is asked twice. `budget` stops the run before it costs more.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.curation import endpoint


def get_config(arg: str | None = None) -> ConfigDict:
    parse_arg(arg)
    config = ConfigDict()
    config.source = ""  # PangeaIns.json, or any *.jsonl or *.parquet in its form
    config.source_language = "en"
    # Which languages the paper translated into is not published.
    config.languages = (
        *("es", "de", "fr", "pt", "ru", "ar", "hi"),
        *("bn", "zh", "ja", "ko", "id", "sw"),
    )
    config.notes = dict(no="Write Bokmål.")  # of languages that are in `languages`, or may be
    config.limit = 0  # records from the first on; 0: all
    config.longest = 20_000  # characters of a record
    config.request = 6_000  # characters of a request: longer conversations take several
    config.checks = ("structure", "language", "copy", "length")
    config.quality = dict(sample=200, embedding_model="")  # "" for no similarity
    config.shard_size = 256
    config.llm = endpoint.client(max_tokens=8192)
    return config
