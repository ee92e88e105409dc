"""SuperGLUE's classification sets; RTE can also be read from GLUE's TSV files."""

from lora_one.datasets.classification import Task

HUB = "aps/super_glue"

TASKS = {
    "boolq": Task(
        hub=(HUB, "boolq"),
        prompt="determine if the statement is true or false based on the passage: {passage}\n"
        "Question: {question}\nresult: ",
        columns=("passage", "question"),
        labels=("false", "true"),
    ),
    "cb": Task(
        hub=(HUB, "cb"),
        prompt="classify the relationship between the premise and hypothesis: \npremise: {premise}\n"
        "hypothesis: {hypothesis}\nresult: ",
        columns=("premise", "hypothesis"),
        labels=("entailment", "contradiction", "neutral"),
    ),
    "copa": Task(
        hub=(HUB, "copa"),
        prompt="choose the correct {question}: \npremise: {premise}\nchoice 1: {choice1}\n"
        "choice 2: {choice2}\nresult: ",
        columns=("question", "premise", "choice1", "choice2"),  # question: cause or effect
        labels=("choice 1", "choice 2"),
    ),
    "rte": Task(
        hub=(HUB, "rte"),
        prompt="determine if the hypothesis is entailed by the premise: \npremise: {premise}\n"
        "hypothesis: {hypothesis}\nresult: ",
        columns=("premise", "hypothesis"),
        labels=("entailment", "not_entailment"),
        other_names={"premise": "sentence1", "hypothesis": "sentence2"},
    ),
    "wic": Task(
        hub=(HUB, "wic"),
        prompt="determine if the word has the same meaning in both sentences: \nword: {word}\n"
        "sentence1: {sentence1}\nsentence2: {sentence2}\nresult: ",
        columns=("word", "sentence1", "sentence2"),
        labels=("false", "true"),
    ),
}
