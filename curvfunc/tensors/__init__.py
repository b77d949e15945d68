"""What comes in and what goes out: trees of tensors, their memory and their precision. Knows nothing of models."""
