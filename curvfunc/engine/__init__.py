"""One forward pass and where it uses the parameters; one backward pass and what is made of it."""
