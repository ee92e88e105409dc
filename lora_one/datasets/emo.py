"""EmoContext: the emotion of a short dialogue. The hub has no validation split; its test split is not used."""

from lora_one.datasets.classification import Task

EMO = Task(
    hub=("SemEvalWorkshop/emo", None),
    prompt="classify the emotion of the text: {text}\nresult: ",
    columns=("text",),
    labels=("others", "happy", "sad", "angry"),
    held_out=None,
)
