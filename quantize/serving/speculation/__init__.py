"""How far a draft model is to look ahead: policies that run in transformers and in replay alike."""
