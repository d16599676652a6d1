"""One file a recipe: all that differs between two models. Any file with a `get_config()` will do for --config."""
