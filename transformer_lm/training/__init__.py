"""State and step, loss, evaluation, optimizers, sharding, the loop, and what it reports."""
