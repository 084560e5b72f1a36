"""The ground: what would make sense in a package that never merges a model."""
