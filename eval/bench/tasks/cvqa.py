"""CVQA: culturally diverse questions on pictures from 36 country-language pairs (afaji/cvqa).

Each pair has its questions in its own language (`cvqa_ind-id`, in the table's "mul") and in English, on the same
pictures (`cvqa_translated-ind-id`, in "en"). The paper took its numbers from the leaderboard; they are not the means of
its printed cells.
"""

from types import MappingProxyType

from eval.bench import task
from eval.bench.metrics import choices
from eval.bench.reading.letter import letter
from eval.bench.reading.mentions import LETTERS

# The paper's name of the pair (Tables 8 and 9): (language, `Subset` of the hub).
PAIRS = {
    "ar-es": ("es", "('Spanish', 'Argentina')"),
    "br-pt": ("pt", "('Portuguese', 'Brazil')"),
    "bu-bg": ("bg", "('Bulgarian', 'Bulgaria')"),
    "ch-es": ("es", "('Spanish', 'Chile')"),
    "ch-zh": ("zh", "('Chinese', 'China')"),
    "co-es": ("es", "('Spanish', 'Colombia')"),
    "ec-es": ("es", "('Spanish', 'Ecuador')"),
    "eg-ar": ("ar", "('Egyptian_Arabic', 'Egypt')"),
    "et-am": ("am", "('Amharic', 'Ethiopia')"),
    "et-or": ("om", "('Oromo', 'Ethiopia')"),
    "fr-br": ("br", "('Breton', 'France')"),
    "in-bn": ("bn", "('Bengali', 'India')"),
    "in-ta": ("ta", "('Tamil', 'India')"),
    "in-te": ("te", "('Telugu', 'India')"),
    "ind-id": ("id", "('Indonesian', 'Indonesia')"),
    "ind-jv": ("jv", "('Javanese', 'Indonesia')"),
    "ind-mi": ("min", "('Minangkabau', 'Indonesia')"),
    "ind-sv": ("su", "('Sundanese', 'Indonesia')"),
    "ir-ir": ("ga", "('Irish', 'Ireland')"),
    "ja-jp": ("ja", "('Japanese', 'Japan')"),
    "ke-sw": ("sw", "('Swahili', 'Kenya')"),
    "ma-my": ("ms", "('Malay', 'Malaysia')"),
    "me-es": ("es", "('Spanish', 'Mexico')"),
    "mo-mg": ("mn", "('Mongolian', 'Mongolia')"),
    "ni-ig": ("ig", "('Igbo', 'Nigeria')"),
    "no-ng": ("no", "('Norwegian', 'Norway')"),
    "pk-ur": ("ur", "('Urdu', 'Pakistan')"),
    "ph-fi": ("fil", "('Filipino', 'Philippines')"),
    "ro-ro": ("ro", "('Romanian', 'Romania')"),
    "ru-ru": ("ru", "('Russian', 'Russia')"),
    "rw-ki": ("rw", "('Kinyarwanda', 'Rwanda')"),
    "sg-zh": ("zh", "('Chinese', 'Singapore')"),
    "sk-ko": ("ko", "('Korean', 'South Korea')"),
    "sp-es": ("es", "('Spanish', 'Spain')"),
    "sr-si": ("si", "('Sinhala', 'Sri_Lanka')"),
    "ur-es": ("es", "('Spanish', 'Uruguay')"),
}


class Cvqa(task.Dataset):
    name, title, group = "cvqa", "CVQA", "multimodal"
    hub, hub_split = "afaji/cvqa", "test"
    version = 2
    changes = MappingProxyType(
        {2: "letters are read in every language, negations and options' texts included"}
    )
    about = 20_800
    subsets = tuple(
        subset
        for pair, (language, _) in PAIRS.items()
        for subset in (
            task.Subset(pair, language, "mul"),
            task.Subset(f"translated-{pair}", "en", "en"),
        )
    )
    fields = task.schema(question=str, options=list, answer=str, images=list)
    generation = task.Generation(max_new_tokens=16)

    def from_hub(self, row, subset, index):
        pair = subset.name.removeprefix("translated-")
        if row["Subset"] != PAIRS[pair][1]:
            return None
        prefix = "" if subset.name == pair else "Translated "
        options, label = list(row[f"{prefix}Options"]), int(row["Label"])
        if not 0 <= label < len(options):
            # The paper's harness reads a hidden label, -1, as option D.
            raise ValueError(f"{row['ID']}: the label is {label}, this copy hides its answers")
        return {
            "id": str(row["ID"]),
            "question": row[f"{prefix}Question"],
            "options": options,
            "answer": LETTERS[label],
            "images": [row["image"]],
        }

    def problem(self, row):
        return choices.wrong_letter(row["answer"], row["options"])

    def prompt(self, document, subset, profile):
        row = document.row
        options = "\n".join(f"{k}. {text}" for k, text in zip(LETTERS, row["options"]))
        return task.Prompt(
            f"Question: {row['question']} \n\n Options: {options} \n\n "
            "Answer with the option's letter from the given choices directly.",
            document.images,
        )

    def score(self, document: task.Document, response: str, subset, profile, reply=None):
        row = document.row
        return score_letter(
            self, document, response, subset, profile, options=row["options"], gold=row["answer"]
        )


def score_letter(dataset, document, response, subset, profile, *, options, gold):
    """Accuracy of the letter read from a response; M3Exam uses it too."""
    drawn = False
    if profile == "paper":
        seed = f"{dataset.name}_{subset.name}/{document.id}"
        chosen, drawn = choices.paper_letter(response, options, seed=seed)
    else:
        chosen = letter(task.answer_text(response), options, subset.language)
    return dataset.mean_score(chosen, acc=chosen == gold, unreadable=drawn or chosen is None)


DATASET = Cvqa()
