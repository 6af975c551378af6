"""Images for training: sources, transforms and the resumable loader."""
