"""L3 stage: held-out bits per byte and verified tasks."""
