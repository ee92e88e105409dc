"""What the tests of comparisons share."""

RATE = "model.learning_rate"
