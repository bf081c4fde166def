"""L3 stage: pre-training, mid-training with distillation, SFT."""
