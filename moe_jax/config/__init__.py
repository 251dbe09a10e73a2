"""Settings: what they are (fields, model, schema) and how a YAML file becomes them (load)."""
