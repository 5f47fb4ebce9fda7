"""The contract between conversion and daemon: manifest, sub-models, errors."""
