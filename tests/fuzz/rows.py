"""One row of each data set whose answers are texts."""

ROWS = {
    "cvqa": {"options": ["a dog", "cat", "1 000", "the answer"], "answer": "B", "images": ["a"]},
    "m3exam": {
        "options": ["A. x", "B. y"],
        "answer": "2",
        "subject": "math",
        "background": [],
        "images": [],
    },
    "m_llavabench": {"gpt_answer": "It is a dog.", "question": "What is this?", "images": ["a"]},
    "marvl": {"answer": True, "images": ["a"]},
    "xm100": {"captions": ["a dog runs", "a brown dog"], "images": ["a"]},
    "xgqa": {"answer": "man", "images": ["a"]},
    "maxm": {"answers": ["a man", "1 000"], "images": ["a"]},
    "xmmmu": {
        "options": ["a dog", "1"],
        "answer": "B",
        "question_type": "multiple-choice",
        "images": ["a"],
    },
    "xmmmu open": {"options": [], "answer": "12", "question_type": "open", "images": ["a"]},
    "flores": {"target": "a dog runs on the grass"},
    "tydiqa": {"answers": ["the year 1990"]},
    "mgsm": {"answer": "18"},
}
