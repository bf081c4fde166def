"""L3 stage: capability-probing sets."""
