"""Clients of an endpoint on loopback, and what is asked of them."""

import sqlite3

from pangea_jax.curation import llm

MANY = [f"prompt {number}" for number in range(60)]


def echo(request, kind):
    return f"{kind}: {request['messages'][-1]['content']}"


def client_config(endpoint, **settings):
    defaults = {"model": "m", "retries": 2, "timeout": 5.0, "patience": 5.0}
    return llm.ClientConfig(base_url=endpoint.url, **defaults | settings)


def ask(client, prompt, **sampling):
    return client.complete([{"role": "user", "content": prompt}], purpose="test", **sampling)


def calls_under_way(path):
    return sqlite3.connect(path).execute("SELECT COUNT(*) FROM under_way").fetchone()[0]
