"""L0: typed, frozen, strict settings; quantities with units; YAML with `extends` and overrides."""
