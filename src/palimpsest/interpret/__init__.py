"""What latents mean and do: examples, logit lens, labels with their scores, steering."""
