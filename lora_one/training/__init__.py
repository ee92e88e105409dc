"""Fine-tuning with the Hugging Face Trainer: settings, batches, callbacks and resume points."""
