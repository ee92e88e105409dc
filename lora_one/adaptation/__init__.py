"""What is trained: LoRA adapters, an r x r core between frozen factors, AdaLoRA, or every weight."""
