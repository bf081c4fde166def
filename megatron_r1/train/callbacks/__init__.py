"""What happens around the training step: journals, curves, checkpoints. One file per concern."""
