"""From bytes on disk to a sharded batch: records, store, tokenizer, pictures, pipeline."""
