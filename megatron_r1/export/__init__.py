"""L3 stage: Hugging Face folder with proof of parity."""
