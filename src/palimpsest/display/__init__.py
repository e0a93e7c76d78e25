"""What a person sees of a result: text in which nothing hides, numbers, and cards in notebooks. No torch."""
