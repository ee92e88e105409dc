"""What an evaluation prints: an interval for a share of all examples, the standard error of everything else."""

from lora_one.evaluation.output import show


def test_each_uncertainty_is_named(capsys):
    metrics = {"accuracy": 0.0, "accuracy_stderr": 0.0, "matthews": 0.25, "matthews_stderr": 0.125}
    show("glue", {"metrics": metrics, "counts": {"correct": 0, "total": 200}})
    accuracy, matthews, counts = capsys.readouterr().out.splitlines()
    assert accuracy == "glue accuracy: 0.00 % (95 % interval 0.00 to 1.88, n = 200)"
    assert matthews == "glue matthews: 25.00 % (standard error 12.50)"
    assert "total 200" in counts


def test_a_loss_is_not_printed_as_a_share(capsys):
    bits = {"name": "bits", "value_name": "bits", "scale": 1, "digits": 3, "higher": False}
    metrics = {"loss": 2.5, "loss_stderr": 0.03125, "rate": 1.25}
    show("mine", {"metrics": metrics, "units": {"rate": bits}, "counts": {"documents": 3}})
    assert capsys.readouterr().out.splitlines() == [
        "mine loss: 2.5000 nats (standard error 0.0312)",
        "mine rate: 1.250 bits",
        "documents 3",
    ]
