"""Labels: what a latent is said to stand for, by whom, and how well that fits text it was not made from."""
