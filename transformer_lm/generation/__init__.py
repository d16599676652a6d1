"""A trained model: text in, text and scores out."""
