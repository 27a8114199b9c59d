"""An OpenAI-compatible server of one model; docs/serving.md says how it is used."""
