"""One model at one address, as the pages of the pipelines have it: all that `llm.ClientConfig` can be told."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def client(**changes: Any) -> ConfigDict:
    """The settings of a client, each of which a flag can set: `--config.llm.max_calls=100`."""
    config = ConfigDict()
    config.model = ""  # as the endpoint names it
    config.base_url = "http://localhost:8000/v1"  # any that speaks OpenAI's protocol
    config.api_key_variable = "OPENAI_API_KEY"
    config.concurrency = 32  # calls at once
    config.temperature = 0.0
    config.max_tokens = 4096
    config.extra_body = {}  # further fields of a request, such as vLLM's
    config.timeout = 300.0  # seconds
    config.retries = 4
    config.patience = 7_200.0  # seconds to wait for an endpoint that answers nobody
    config.price_in = 0.0  # dollars per million tokens
    config.price_out = 0.0
    config.image_tokens = 3_000  # the most that a picture is charged as
    config.budget = placeholder(float)  # dollars; needs the prices
    config.max_calls = placeholder(int)
    config.journal = "wal"  # "delete" where machines share --out on a network file system
    config.update(changes)
    return config
