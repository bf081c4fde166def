"""L3 stage: what each document does for each capability."""
