"""LoRA-One and its neighbours, for low-rank fine-tuning."""
