"""The settings of a model at an endpoint, for the configs of the pipelines: the fields of `llm.ClientConfig`."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def client(**changes: Any) -> ConfigDict:
    """The settings of a client. A flag can set each of them: `--config.llm.max_calls=100`."""
    config = ConfigDict()
    config.model = ""  # the endpoint's name of the model
    config.base_url = "http://localhost:8000/v1"  # any endpoint with OpenAI's protocol
    config.api_key_variable = "OPENAI_API_KEY"
    config.concurrency = 32  # calls at once
    config.temperature = 0.0
    config.max_tokens = 4096
    config.extra_body = {}  # further fields of a request, such as vLLM's
    config.timeout = 300.0  # seconds
    config.retries = 4
    config.patience = 7_200.0  # seconds to wait while the endpoint answers no request
    config.price_in = 0.0  # dollars per million tokens
    config.price_out = 0.0
    config.image_tokens = 3_000  # maximum tokens of a picture, for the budget
    config.budget = placeholder(float)  # dollars; needs the prices
    config.max_calls = placeholder(int)
    config.journal = "wal"  # "delete" where machines share --out on a network file system
    config.update(changes)
    return config
