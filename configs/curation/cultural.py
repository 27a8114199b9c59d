"""Cultural instructions from image/alt-text pairs of the web, as the paper made 1.5M of PangeaIns (section 2.2).

    python launch/curate.py cultural --config=configs/curation/cultural.py --out=data/cultural \\
        --config.source=data/laion-multi
    python launch/build_data.py pangeains --source=data/cultural/records --out=data/cultural_store

The source is LAION's Parquet files, whose pictures are fetched after everything else is decided, or the output of
img2dataset. The paper began with 10M pairs of LAION-Multi and kept 1M pictures. Each scored pair takes about 500 tokens
of prompt and 35 of reply, and each remaining picture 1,100 and 1,200: at the prices below about 7 dollars per thousand
pictures. Set the prices of your model and a budget, and begin with a part of the source. report.md has the yield of
every stage, usage.json the cost.
"""

from ml_collections import ConfigDict

from configs.curation import endpoint


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.source = "data/laion-multi"
    config.name = "laion-multi"  # the records' source is cultural/<name>
    config.seed = 0
    config.shard_size = 256
    config.languages = ()  # canonical codes; (): the 39 of PangeaIns
    # File of offensive words and phrases, one per line; the paper names no list.
    config.blocked_words = ""
    config.filters = dict(
        min_side=224,
        max_side=4096,
        min_aspect=0.25,
        max_aspect=3.0,
        min_chars=5,
        max_chars=5000,
        nsfw=("UNLIKELY",),
        min_similarity=0.3,
    )
    # A two-tower model of transformers that scores pictures at hand; "" takes the source's own `similarity`.
    config.clip_model = ""
    config.near_duplicates = dict(min_text_similarity=0.8, max_hash_distance=4)
    # The paper thins out frequent subjects and languages, but gives no numbers. None: no limit.
    config.balance = dict(per_subject=20_000, per_language=60_000, seed=0)
    # Say in user_agent how you can be reached. Sites see it, and their robots.txt may name it.
    config.fetch = dict(timeout=20.0, private=False, robots=True, user_agent="pangea_jax")
    config.caption_share = 0.3  # share of pictures whose caption becomes a record as well
    config.picture_side = 1024  # maximum pixels a side of what the model sees
    config.scoring_llm = endpoint.client(
        model="meta-llama/Llama-3.1-8B-Instruct", concurrency=64, max_tokens=64
    )
    for name in ("budget", "max_calls", "journal"):  # those of config.llm count for both models
        del config.scoring_llm[name]
    config.llm = endpoint.client(
        model="gemini-1.5-pro",
        base_url="https://generativelanguage.googleapis.com/v1beta/openai/",
        api_key_variable="GEMINI_API_KEY",
        concurrency=16,
        price_in=1.25,
        price_out=5.0,
        budget=100.0,
    )
    return config
