"""L3 stage: raw files to shards."""
