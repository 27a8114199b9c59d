"""Reads answers: which option, which truth value, which number, which short text.

One module per reader (`letter`, `truth`, `number`, `short`), one table of words for all languages (`words.toml`), one
place for text (`text`). A reader never raises on a response; it gives a reading, or None for "not answered".
"""
