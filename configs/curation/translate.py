"""English instruction records into other languages, as the paper's 1.28M translated ones (section 2.1).

    python launch/curate.py translate --config=configs/curation/translate.py --out=data/translated \\
        --config.source=PangeaInstruct/PangeaIns.json --config.languages=sw,yo --config.limit=1000 \\
        --config.llm.model=NAME --config.llm.base_url=http://localhost:8000/v1
    python launch/build_data.py pangeains --source=data/translated/records --images=PangeaInstruct --out=data/store

Any endpoint with OpenAI's protocol works: vLLM (`vllm serve NAME`), Gemini
(https://generativelanguage.googleapis.com/v1beta/openai/), or a hosted one. OPENAI_API_KEY holds the key. Start with
--config.limit=100 and read data/translated/report.md. It says what was dropped and why, and how well a sample reads
when it is translated back. After a stop, a kill or a spent budget, the same command continues and requests no stored
reply again. For a higher limit give another --out.

To add a language, add its tag to `languages` (if pangea_jax/languages.py lacks it, add a line there too; see
docs/data.md, "A new language"). `notes` tells the model what it should know, such as the orthography. For example:

    from configs.curation import translate

    def get_config(arg=None):
        config = translate.get_config(arg)
        config.languages = ("yo",)
        config.notes.yo = "Write the standard orthography with its tone marks and underdots."
        return config

Cost: the 60 English records of the official sample take 490 tokens of prompt on average, 194 of them instructions, and
about 290 tokens of reply in Latin letters, more in other scripts (Qwen's vocabulary). A million records in one language
then cost about $1,900 at $1 and $5 per million tokens, plus repeated requests. `budget` stops the run before it costs
more.
"""

from ml_collections import ConfigDict

from configs.arguments import parse_arg
from pangea_jax.curation.translate import TranslateConfig
from pangea_jax.typed_config import section


def get_config(arg: str | None = None) -> ConfigDict:
    parse_arg(arg)
    config = section(TranslateConfig, source="", source_language="en")
    # The paper does not say into which languages it translated.
    config.languages = (
        *("es", "de", "fr", "pt", "ru", "ar", "hi"),
        *("bn", "zh", "ja", "ko", "id", "sw"),
    )
    config.notes = {"no": "Write Bokmål."}
    config.llm.max_tokens = 8192
    return config
