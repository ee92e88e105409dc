"""Fine-tuning: the loop on the Hugging Face Trainer, and what happens beside its steps."""
