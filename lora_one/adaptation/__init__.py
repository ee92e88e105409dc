"""The kinds of fine-tuning: LoRA adapters, an r x r core between frozen factors, AdaLoRA, and full fine-tuning."""
