"""Training, evaluation and the data that they need: readers, the simulated city, the tools around them."""
