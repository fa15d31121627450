"""Training: objectives on either jaw of the bracket, the loop around them, and robust linear models."""
