"""What all the rest stands on, without any MDP: errors, results, validation, batches, kernels, rounding, captures."""
