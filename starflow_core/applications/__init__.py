"""What only a flow can do with a pipeline: clips to noise and back, likelihoods, edits of what is there."""
