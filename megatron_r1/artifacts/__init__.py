"""L0: immutable folders with manifests: how stages talk to each other. Free of torch."""
