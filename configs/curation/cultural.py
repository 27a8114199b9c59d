"""Cultural instructions from image/alt-text pairs of the web, the method of 1.5M records of PangeaIns (section 2.2).

    python launch/curate.py cultural --config=configs/curation/cultural.py --out=data/cultural \\
        --config.source=data/laion-multi
    python launch/build_data.py pangeains --source=data/cultural/records --out=data/cultural_store

The source is LAION's Parquet files, whose pictures are fetched only after all other decisions, or the output of
img2dataset. The paper began with 10M pairs of LAION-Multi and kept 1M pictures. Each scored pair takes about 500 tokens
of prompt and 35 of reply, and each remaining picture 1,100 and 1,200. At the prices below that is about 7 dollars per
thousand pictures. Set the prices of your model and a budget, and begin with a part of the source. report.md has the
yield of every stage, usage.json the cost.
"""

from ml_collections import ConfigDict

from pangea_jax.curation.cultural import CulturalConfig
from pangea_jax.typed_config import section


def get_config() -> ConfigDict:
    config = section(CulturalConfig, source="data/laion-multi", name="laion-multi")
    config.filters.update(
        min_side=224,
        max_side=4096,
        min_aspect=0.25,
        max_aspect=3.0,
        min_chars=5,
        max_chars=5000,
        nsfw=("UNLIKELY",),
        min_similarity=0.3,
    )
    config.blocked_words = ""  # the paper names no list
    config.near_duplicates.update(min_text_similarity=0.8, max_hash_distance=4)
    # The paper thins out frequent subjects and languages, but gives no numbers.
    config.balance.update(per_subject=20_000, per_language=60_000)
    # Say in user_agent how you can be reached. Sites see it, and their robots.txt may name it.
    config.fetch.update(user_agent="pangea_jax")
    config.scoring_llm.update(
        model="meta-llama/Llama-3.1-8B-Instruct", concurrency=64, max_tokens=64
    )
    config.llm.update(
        model="gemini-1.5-pro",
        base_url="https://generativelanguage.googleapis.com/v1beta/openai/",
        api_key_variable="GEMINI_API_KEY",
        concurrency=16,
        price_in=1.25,
        price_out=5.0,
        budget=100.0,
    )
    return config
