"""A model's folder for other people's tools, and back."""
