"""What happens on every step: inputs of graphs, gradients, optimizers."""
