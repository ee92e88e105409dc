"""Classification sets: a prompt and a word for a model that generates text, texts and a class index for a head."""

from dataclasses import dataclass, field

from lora_one.datasets.settings import DatasetConfig
from lora_one.datasets.sources import Hub, read_rows
from lora_one.errors import UsageError
from lora_one.types import Example


@dataclass(frozen=True)
class Task:
    """One classification set.

    columns: the text columns, named as on the hub and in ``prompt``.  labels: the words of the classes, by index.
    held_out: the hub's validation split; None: there is none.  other_names: column -> its name in GLUE's TSV files.
    headless: the columns of GLUE's TSV file, if it has no header.
    """

    hub: Hub
    prompt: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    held_out: str | None = "validation"
    other_names: dict[str, str] = field(default_factory=dict)
    headless: tuple[str, ...] = ()

    def train(self, config: DatasetConfig) -> list[Example]:
        return self.read_split(config.path, "train")

    def validation(self, config: DatasetConfig) -> list[Example]:
        return self.read_split(config.path, self.held_out)

    def read_split(self, path: str | None, split: str) -> list[Example]:
        """Return the examples of a split. Raises UsageError: an unknown label (the row is named)."""
        wanted = [*self.columns, "label"]
        rows = read_rows(self.hub, path, split, wanted, other_names=self.other_names, headless=self.headless)
        where = f"{path or self.hub[0]}, {split} row"
        return [self.example_of(row, f"{where} {number}") for number, row in enumerate(rows, start=1)]

    def example_of(self, row: dict[str, str], where: str) -> Example:
        """Return a row's example; its label is the word or the index of a class. Raises UsageError: it is neither."""
        indices = {str(index): index for index in range(len(self.labels))}
        indices |= {word: index for index, word in enumerate(self.labels)}
        label = indices.get(row["label"])
        if label is None:
            raise UsageError(
                f"{where}: the label {row['label']!r} is not one of {', '.join(self.labels)} or 0 to "
                f"{len(self.labels) - 1}: pass a split of this data set with labels"
            )
        word, texts = self.labels[label], tuple(row[column] for column in self.columns)
        return Example(self.prompt.format(**row), word, gold=word, texts=texts, label=label)
