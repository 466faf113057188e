"""Reading and writing files: checkpoints, provenance, the state of a stopped
run, strict JSON and YAML."""
