"""L3 stage: influence to sampling weights."""
