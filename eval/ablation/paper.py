"""The scores of the paper's ablations, in percent (arXiv 2410.16153 v3, section 5). Figures show them beside ours.

The values of Figures 5 and 7 were read from the drawing, to about 0.3. Figure 6 prints its numbers.
"""

# Figure 5: millions of examples -> benchmark -> (English, multilingual).
NUM_SAMPLES = {
    0.6: {"M3Exam": (56.3, 40.0), "xGQA": (61.7, 56.5), "xMMMU": (43.1, 41.4), "MaXM": (51.5, 47.4)},
    1.8: {"M3Exam": (55.7, 39.8), "xGQA": (65.0, 59.5), "xMMMU": (42.3, 41.3), "MaXM": (54.1, 51.7)},
    3.1: {"M3Exam": (58.3, 42.5), "xGQA": (67.1, 62.0), "xMMMU": (44.3, 42.1), "MaXM": (53.0, 52.8)},
    4.3: {"M3Exam": (58.6, 42.2), "xGQA": (67.9, 62.6), "xMMMU": (44.4, 44.0), "MaXM": (54.1, 53.5)},
    5.5: {"M3Exam": (61.0, 42.8), "xGQA": (68.0, 62.5), "xMMMU": (44.9, 44.0), "MaXM": (55.2, 54.3)},
}  # fmt: skip

# Figure 6: percent of English -> (English, multilingual), mean accuracy; the paper does not name the tasks.
EN_RATIO = {
    0: (47.5, 35.2),
    20: (51.0, 38.1),
    40: (51.6, 38.7),
    60: (50.7, 38.5),
    80: (51.8, 38.5),
    100: (53.2, 33.0),
}

# Figure 7: benchmark -> language -> (examples, score), both in percent of English.
POPULARITY = {
    "CVQA": {"ta": (1.4, 73.0), "bn": (4.6, 87.9), "sw": (5.2, 58.9), "ur": (6.1, 87.0), "hi": (6.4, 97.3),
        "id": (7.0, 92.0), "zh": (21.8, 100.3)},
    "xGQA": {"bn": (4.7, 91.0), "de": (5.2, 95.3), "pt": (6.9, 95.5), "id": (7.0, 92.9), "ko": (7.2, 91.1),
        "ru": (8.5, 93.3), "zh": (21.8, 92.1)},
    "xMMMU": {"ar": (6.3, 92.6), "hi": (6.4, 91.0), "pt": (6.9, 101.1), "id": (7.0, 101.8), "fr": (7.6, 99.1),
        "ja": (15.8, 88.6)},
    "MaRVL": {"ta": (1.5, 79.8), "sw": (5.2, 86.3), "tr": (5.5, 97.5), "id": (7.0, 93.5), "zh": (21.9, 97.0)},
}  # fmt: skip


def curves(ablation: str) -> dict[str, dict[float, tuple[float, float]]]:
    """Benchmark -> quantity varied -> (English, multilingual) of the paper's figure for a config
    such as "ablate_en_ratio"; empty if the paper has no such figure."""
    if ablation == "ablate_en_ratio":
        return {"average": dict(EN_RATIO)}
    if ablation == "ablate_num_samples":
        names = next(iter(NUM_SAMPLES.values()))
        return {name: {x: row[name] for x, row in NUM_SAMPLES.items()} for name in names}
    return {}


# Titles of the panels and labels of their horizontal axes.
SOURCES = {
    "ablate_en_ratio": "Pangea-7B (paper, Figure 6)",
    "ablate_num_samples": "Pangea-7B (paper, Figure 5)",
    "ablate_language_popularity": "Pangea-7B (paper, Figure 7)",
}
AXES = {
    "ablate_en_ratio": "English among the examples (%)",
    "ablate_num_samples": "examples trained on (millions)",
}
