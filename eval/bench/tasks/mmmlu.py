"""MMMLU: the 14,042 questions of MMLU in 14 translations, and in English, by log-likelihood (openai/MMMLU)."""

from eval.bench.metrics import continuations
from eval.bench.metrics.choices import wrong_letter
from eval.bench.reading.mentions import LETTERS
from eval.bench.task import Dataset, Generation, Prompt, Source, language_subsets, schema
from pangea_jax import languages

_LOCALES = "AR_XY BN_BD DE_DE ES_LA FR_FR HI_IN ID_ID IT_IT JA_JP KO_KR PT_BR SW_KE YO_NG ZH_CN"
# language: configuration on the hub
LOCALES = {locale[:2].lower(): locale for locale in _LOCALES.split()}


class Mmmlu(Dataset):
    name, title, group = "mmmlu", "MMMLU", "text"
    hub = "openai/MMMLU"
    subsets = language_subsets(dict.fromkeys(("en", *LOCALES), 14042))
    fields = schema(question=str, options=list, answer=str, subject=str)
    generation = Generation(output_type="loglikelihood", chat=False)

    def source(self, subset):
        if subset.language == "en":
            return Source("cais/mmlu", "all", "test")
        return Source(self.hub, LOCALES[subset.language], "test")

    def from_hub(self, row, subset, index):
        if subset.language == "en":
            options, answer = list(row["choices"]), LETTERS[int(row["answer"])]
            question, subject = row["question"], row["subject"]
        else:
            options, answer = [str(row[key]) for key in LETTERS[:4]], row["Answer"]
            question, subject = row["Question"], row["Subject"]
        texts = {"question": question, "options": options, "answer": answer, "subject": subject}
        return {"id": str(index)} | texts

    def problem(self, row):
        return wrong_letter(row["answer"], row["options"])

    def prompt(self, document, subset, profile):
        row = document.row
        subject = row["subject"].replace("_", " ")
        description = f"The following are multiple choice questions (with answers) about {subject}"
        if subset.language != "en":
            description += f" ({languages.get(subset.language).english_name})"
        options = "\n".join(f"{k}. {text}" for k, text in zip(LETTERS, row["options"]))
        return Prompt(f"{description}.\n\n{row['question']}\n{options}\nAnswer:")

    def choices(self, document):
        return tuple(f" {key}" for key in LETTERS[: len(document.row["options"])])

    def score(self, document, response, subset, profile, reply=None):
        gold = LETTERS.index(document.row["answer"])
        return continuations.score(self, response, self.choices(document), gold)


DATASET = Mmmlu()
