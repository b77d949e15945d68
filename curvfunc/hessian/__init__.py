"""What curves besides the loss: the diagonal of the Hessian, and its averages from layer to layer."""
