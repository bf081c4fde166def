"""The decoder of MobileLLM-R1: configuration, construction, losses, forward passes, Hugging Face mapping."""
