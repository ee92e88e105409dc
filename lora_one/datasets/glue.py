"""GLUE, from the hub or its TSV files; evaluated on the validation split, because the test labels are not public."""

from lora_one.datasets.classification import Task

HUB = "nyu-mll/glue"

TASKS = {
    "sst2": Task(
        hub=(HUB, "sst2"),
        prompt="classify the sentiment of the text: {sentence}\nresult: ",
        columns=("sentence",),
        labels=("negative", "positive"),
    ),
    "cola": Task(
        hub=(HUB, "cola"),
        prompt="classify the grammaticality of the text: {sentence}\nresult: ",
        columns=("sentence",),
        labels=("unacceptable", "acceptable"),
        headless=("source", "label", "mark", "sentence"),
    ),
    "qqp": Task(
        hub=(HUB, "qqp"),
        prompt="classify the semantic similarity of the text: {question1}\n{question2}\nresult: ",
        columns=("question1", "question2"),
        labels=("different", "duplicate"),
        other_names={"label": "is_duplicate"},
    ),
    "mrpc": Task(
        hub=(HUB, "mrpc"),
        prompt="classify the semantic similarity of the text: {sentence1}\n{sentence2}\nresult: ",
        columns=("sentence1", "sentence2"),
        labels=("different", "equivalent"),
        other_names={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    ),
    "mnli": Task(
        hub=(HUB, "mnli"),
        prompt="classify the semantic similarity of the text: {premise}\n{hypothesis}\nresult: ",
        columns=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        held_out="validation_matched",
        other_names={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
    ),
    "qnli": Task(
        hub=(HUB, "qnli"),
        prompt="classify the semantic similarity of the question and the sentence: {question}\n{sentence}\nresult: ",
        columns=("question", "sentence"),
        labels=("entailment", "not_entailment"),
    ),
}
