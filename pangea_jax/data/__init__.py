"""The data pipeline: records, store, tokenizer, images, and batches made from them."""
