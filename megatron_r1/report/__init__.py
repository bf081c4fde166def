"""L3 stage: one self-contained page about a run."""
